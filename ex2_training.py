"""One optimiser step (`train_step`), the loop around it (`train`) and the test loop (`test`): 2.1, 2.2 d and e.

Start here to see how a diffusion model learns. `ex2_fit` puts everything around the same step that a long run needs.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

from ex2_diffusion import check_images, evenly_spaced
from ex2_distributed import mean_over_processes
from ex2_metrics import loss_over_timesteps

EMA_RAMP = 0.1  # of the images seen is what the averaged weights at most take to forget half


class RunError(RuntimeError):
    """A run can't go on, and the command line is not the reason. The message is one line."""


class Rows(NamedTuple):
    """The part of a batch that one of several processes has."""

    total: int  # images of the batch, over all processes
    own: slice  # those of this process
    weight: float  # of their mean loss, so that the mean over processes is the mean over the batch
    seed: int  # of what the network draws in this process: which labels to drop


def train_step(
    model,
    optimizer,
    diffusor,
    images: Tensor,
    labels: Tensor,
    *,
    average: Average | None = None,
    rows: Rows | None = None,
    loss_type: str = "l2",
    grad_clip: float = 1.0,
    min_snr: float | None = None,
    amp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Ho et al. 2020 for one batch. Returns (loss, gradient norm before clipping).

    Nothing here waits for the GPU, and what changes from step to step is in tensors: the learning rate and the share of
    the average, beside images and labels. So a GPU can replay it as a whole (`ex2_replay`).

    Args:
        images: (B, C, H, W) in [-1, 1].  labels: (B,), used where the model is class-conditional.
        average: of the weights, updated last.  rows: where several processes share the batch.
        loss_type, min_snr: as in `Diffusion.p_losses`.  grad_clip: largest norm of the gradient.  amp: compute in
            bfloat16 where torch deems it safe.
    """
    t, noise = draw(images, diffusor.timesteps, rows)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        classes = labels if is_conditional(model) else None
        loss = diffusor.p_losses(model, images, t, noise, loss_type, classes, min_snr)  # Eq. 9
    if rows is not None:
        loss = loss * rows.weight
    optimizer.zero_grad()
    loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip)
    optimizer.step()
    if average is not None:
        average.update(weights)
    return loss.detach(), norm


def draw(images: Tensor, timesteps: int, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """A random time (B,) and the noise (B, C, H, W) for each image, from torch's global generator.

    Several processes have the same seed here. Each one draws for the whole batch and keeps its own rows: so they learn
    from the same times and noise as one process does, to rounding.
    """
    total, own = (len(images), slice(None)) if rows is None else (rows.total, rows.own)
    t = torch.randint(0, timesteps, (total,), device=images.device)[own]
    noise = torch.randn(total, *images.shape[1:], device=images.device)[own]
    if rows is not None:
        torch.manual_seed(rows.seed)
    return t, noise


def is_conditional(model) -> bool:
    """Whether a model, or the one that DDP holds, takes class labels."""
    return getattr(getattr(model, "module", model), "class_free_guidance", False)


def build_optimizer(model, lr: float, beta1: float = 0.9) -> AdamW:
    """AdamW, fused where torch has that for the device: one pass over all weights instead of hundreds of small ones.

    Its learning rate is a tensor, which `set_learning_rate` changes.
    """
    device = next(model.parameters()).device
    settings = {"lr": torch.tensor(lr, device=device), "betas": (beta1, 0.999), "capturable": device.type == "cuda"}
    try:
        optimizer = AdamW(model.parameters(), **settings, fused=True)
    except RuntimeError:  # of a CPU before torch 2.4
        optimizer = AdamW(model.parameters(), **settings)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are: no news worth a warning
    return optimizer


def set_learning_rate(optimizer, lr: float) -> None:
    """Sets the learning rate of the next step, in an optimiser of `build_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def learning_rate(peak: float, step: int, total_steps: int, warmup_steps: int = 0, time_spent: float = 0.0) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up to `peak`, then cosine decay to zero at the end.

    Args:
        warmup_steps: at most a tenth of all steps count.
        time_spent: share of the time that the training may take; where it is further than the steps, it decides.
    """
    warmup = min(warmup_steps, total_steps // 10)
    rise = min(1.0, (step + 1) / (warmup + 1))
    done = max((step - warmup) / max(1, total_steps - warmup), time_spent)
    return peak * (rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))))


class Average:  # swa_utils.AveragedModel reads a counter on the CPU at every update: no GPU could replay that
    """The exponential moving average of the weights (EMA), held by a copy of the model.

    It forgets half in `ema_images` images, or in a tenth of those seen so far. The tenth matters for short runs: with a
    constant decay of 0.9999 the average of 750 steps would be 93% initial weights. It is the ramp of EDM (Karras et al.
    2022, https://arxiv.org/abs/2206.00364), at twice its length.
    """

    def __init__(self, model, ema_images: float, batch_size: int):
        self.model = deepcopy(model).requires_grad_(False)
        self.weights = list(self.model.parameters())
        self.ema_images, self.batch_size = ema_images, batch_size
        self.share = torch.ones((), device=self.weights[0].device)  # of the new weights in the average

    def prepare(self, step: int) -> None:
        """Sets how much the update of optimiser step 0, 1, ... will forget."""
        half_life = min(self.ema_images, EMA_RAMP * (step + 1) * self.batch_size)
        self.share.fill_(1 - 0.5 ** (self.batch_size / half_life))

    @torch.no_grad()
    def update(self, weights: list[Tensor]) -> None:
        """average += share * (weights - average)."""
        difference = torch._foreach_sub(weights, self.weights)
        torch._foreach_mul_(difference, self.share)
        torch._foreach_add_(self.weights, difference)


def train(model, trainloader, optimizer, diffusor, epoch, device, args) -> float:
    """The handed-out training loop: one epoch of `train_step`. Returns the mean loss over its images.

    Args:
        trainloader: yields (images (B, C, H, W) in [-1, 1], labels (B,)).
        args: has `log_interval` and `dry_run` (one batch only).

    Raises ValueError: images that are not in [-1, 1].  RunError: the loss is no longer finite.
    """
    model.train()
    meter, lr = LossMeter(epoch), float(optimizer.param_groups[0]["lr"])
    progress = tqdm(trainloader, f"epoch {epoch + 1}", disable=args.dry_run or None)
    for step, (images, labels) in enumerate(progress, 1):
        if step == 1:
            check_images(images.cpu())
        loss, norm = train_step(model, optimizer, diffusor, images.to(device), labels.to(device))
        meter.add(loss, norm, len(images), lr)
        if args.dry_run or step == len(trainloader) or len(meter.window) == args.log_interval:
            show_loss(progress, epoch, step, meter.close_window()[0])
        if args.dry_run:
            break
    return meter.mean


def test(model, testloader, diffusor, device, args) -> dict:
    """2.2 e: l1 and l2 loss at fixed times with fixed noise, without label dropout; see `loss_over_timesteps`.

    args: `eval_timesteps` and `eval_images` bound the work where it has them; `dry_run` takes one image.
    """
    training = model.training
    model.eval()
    times = evenly_spaced(diffusor.timesteps, getattr(args, "eval_timesteps", 10))
    max_images = 1 if args.dry_run else getattr(args, "eval_images", None)
    losses = loss_over_timesteps(model, testloader, diffusor, times, max_images=max_images)
    model.train(training)
    return losses


def show_loss(progress: tqdm, epoch: int, step: int, loss: float) -> None:
    """Shows the loss beside the bar. Without a terminal, as in a batch job, it prints a line."""
    progress.set_postfix(loss=f"{loss:.4f}")
    if progress.disable:
        print(f"epoch {epoch + 1}, step {step}/{progress.total or step}: loss {loss:.4f}")


class LossMeter:
    """Loss of one epoch as mean over images and processes; reads the device once per window, not once per step."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.window: list[tuple] = []  # (loss, gradient norm, images, lr) of the steps since the last row of the log
        self.steps, self.images, self.total = 0, 0, 0.0

    def add(self, loss: Tensor, grad_norm: Tensor, images: int, lr: float) -> None:
        self.window.append((mean_over_processes(loss), grad_norm, images, lr))

    def read_window(self) -> tuple:
        """(losses, gradient norms, images) of the window, one entry per step.

        Raises RunError: a loss or a gradient is not finite.
        """
        losses, norms, counts, rates = zip(*self.window)
        losses, norms, counts = torch.stack(losses).cpu(), torch.stack(norms).cpu(), torch.tensor(counts)
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            bad = int(finite.int().argmin())
            where = f"step {self.steps + bad + 1} of epoch {self.epoch + 1} (learning rate {rates[bad]:.2g})"
            advice = "lower --lr or --grad_clip, or give --amp off, and choose a new --run_name"
            what = f"the loss or its gradient is not finite in {where}: {advice}"
            raise RunError(f"{what}; the last checkpoint is untouched")
        return losses, norms, counts

    def close_window(self) -> tuple[float, float]:
        """Mean loss over the images and mean gradient norm over the steps of the window, which starts anew.

        Raises RunError: a loss or a gradient of the window is not finite.
        """
        losses, norms, counts = self.read_window()
        window_total = (losses.double() * counts).sum().item()
        self.total += window_total
        self.images += int(counts.sum())
        self.steps += len(counts)
        self.window.clear()
        return window_total / int(counts.sum()), norms.mean().item()

    @property
    def mean(self) -> float:
        return self.total / self.images

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the epoch that is going on.

        Raises RunError: a loss or a gradient of the window is not finite.
        """
        if self.window:
            self.read_window()
        window = [(loss.cpu(), norm.cpu(), images, lr) for loss, norm, images, lr in self.window]
        return {"steps": self.steps, "images": self.images, "total": self.total, "window": window}

    def load_state_dict(self, saved: dict) -> None:
        """Restores what `state_dict` returned."""
        self.steps, self.images, self.total = saved["steps"], saved["images"], saved["total"]
        self.window = [tuple(entry) for entry in saved["window"]]
