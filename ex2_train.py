"""The training step (`train_step`), the training loop (`train`), the test loop (`test`): 2.1, 2.2 d, 2.2 e.

Start here to see how a diffusion model learns. `ex2/training/run.py` calls the same loop and adds what long runs need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ex2.machine.processes import all_reduce, shard
from ex2.meter import LossMeter, show_loss
from ex2.noise import ImageNoise, randn
from ex2.optimisation import EMA
from ex2_diffusion import Diffusion, check_images, eval_mode, evenly_spaced

NOISE_SEED = 20_201_216  # of every evaluation, so that the metrics of different runs are comparable


def train(
    model, trainloader, optimizer, diffusor, epoch, device, args, *, meter=None, take_step=None, after_step=None
) -> float:
    """The training loop of one epoch: `train_step` on every batch. Returns the mean loss over its images. 2.1, 2.4 c.

    Args:
        model: the U-Net.
        trainloader: yields (images (B, C, H, W) in [-1, 1], labels (B,)).
        optimizer: of the model's weights, see `build_optimizer`.
        diffusor: the `Diffusion` process.
        epoch: number of the epoch, from 0; for messages.
        device: where the model is.
        args: has `log_interval`, the steps between two lines, and `dry_run` (one batch only).
        meter: a `LossMeter` that may have seen the start of the epoch; None starts a new one.
        take_step: (images, labels) -> (loss, gradient norm); None is `train_step`. A long run replays a CUDA graph.
        after_step: called after every step, ends the epoch if it returns True. A long run saves, and stops on a signal.

    Raises:
        ValueError: images that are not in [-1, 1].
        RunError: the loss is no longer finite.
    """
    model.train()
    meter = meter or LossMeter(epoch)
    take_step = take_step or partial(train_step, model, optimizer, diffusor)
    progress = tqdm(trainloader, f"epoch {epoch + 1}", initial=meter.all_steps, disable=args.dry_run or None)
    for images, labels in progress:
        if meter.all_steps == 0:
            check_images(images)
        loss, grad_norm = take_step(images.to(device), labels.to(device))
        meter.add(loss, grad_norm, len(images))
        if len(meter.window) == args.log_interval:
            show_loss(progress, meter, optimizer)
        ends = after_step is not None and after_step()
        if ends or args.dry_run:
            break
    if meter.window:
        show_loss(progress, meter, optimizer)
    return meter.mean


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
    ema: EMA | None = None,
    rows: Rows | None = None,
    loss_type: str = "l2",
    grad_clip: float = 1.0,
    min_snr: float | None = None,
    amp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Ho et al. 2020 for one batch. Returns (loss, gradient norm before clipping).

    No host synchronisation, and no Python number that changes: learning rate and EMA weight are tensors, as images and
    labels are. A CUDA graph of the step needs that.

    Args:
        images: (B, C, H, W) in [-1, 1].
        labels: (B,), used where the model is class-conditional.
        ema: averages the weights after the step.
        rows: this process's part of the batch, where several processes share it.
        loss_type, min_snr: as in `Diffusion.p_losses`.
        grad_clip: largest norm of the gradient.
        amp: compute in bfloat16 where torch deems it safe.
    """
    t, noise = draw_timesteps_and_noise(images, diffusor.timesteps, rows)
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
    if ema is not None:
        ema.update(weights)
    return loss.detach().clone(), norm  # the loss that torch returns can keep the memory of the whole batch


def draw_timesteps_and_noise(images: Tensor, timesteps: int, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """A random timestep (B,) and the noise (B, C, H, W) for each image, from torch's global generator.

    Several processes have the same seed. Each draws for the whole batch and keeps its rows: what one process would.
    """
    total, own = (len(images), slice(None)) if rows is None else (rows.total, rows.own)
    t = torch.randint(0, timesteps, (total,), device=images.device)[own]
    noise = torch.randn(total, *images.shape[1:], device=images.device)[own]
    if rows is not None:
        torch.manual_seed(rows.seed)
    return t, noise


def is_conditional(model) -> bool:
    """Whether a model, or the one that DDP wraps, takes class labels."""
    return getattr(getattr(model, "module", model), "class_free_guidance", False)


def test(model, testloader, diffusor, device, args) -> dict:
    """The test loop: l1 and l2 loss at fixed timesteps with fixed noise; see `loss_over_timesteps`. 2.2 e.

    Args:
        model: put into eval mode, without label dropping; its own mode is restored.
        testloader: yields (images (B, C, H, W) in [-1, 1], labels (B,)).
        args: has `dry_run` (one image only) and, if you like, `eval_timesteps` and `eval_images`, how many of each.
    """
    timesteps = evenly_spaced(diffusor.timesteps, getattr(args, "eval_timesteps", 10))
    max_images = 1 if args.dry_run else getattr(args, "eval_images", None)
    with eval_mode(model):
        return loss_over_timesteps(model, testloader, diffusor, timesteps, max_images=max_images)


def evaluation_batches(loader: Iterable, device, max_images: int | None) -> Iterator[tuple[Tensor, Tensor, ImageNoise]]:
    """Batches of the first `max_images` images of a loader: (images, labels, their noise).

    Image i has the same noise in every run, at any batch size and on any device. Each process has its part of a batch.
    """
    seen = 0
    for images, labels in tqdm(loader, "evaluating", leave=False, disable=None):
        if max_images is not None:
            images, labels = images[: max_images - seen], labels[: max_images - seen]
        images, labels = images.to(device), labels.to(device)
        check_images(images)
        mine = shard(len(images))
        if mine:
            source = ImageNoise(NOISE_SEED, seen + mine.start, len(mine))
            yield images[mine.start : mine.stop], labels[mine.start : mine.stop], source
        seen += len(images)
        if seen == max_images:
            return


def labels_for(model, labels: Tensor, unconditional: bool = False) -> Tensor | None:
    """The classes that a model is given: the labels, null labels if `unconditional`; None if it takes none."""
    if not is_conditional(model):
        return None
    return torch.full_like(labels, model.null_class) if unconditional else labels


@torch.no_grad()
def loss_over_timesteps(
    model, loader: Iterable, diffusor: Diffusion, timesteps: Sequence[int], *, max_images=None, unconditional=False
) -> dict:
    """Mean error of the predicted noise and of the x_zero estimate at each of `timesteps`, over images of a loader.

    Image i gets the same noise at every timestep and in every run (`evaluation_batches`), so the losses of two models
    differ by the models alone.

    Args:
        model: in eval mode; (x_t, t) -> eps, or (x_t, t, classes) -> eps where its `class_free_guidance` is true.
        max_images: how many of the first images to take; None takes all.
        unconditional: give a class-conditional model the null token in place of the labels.

    Returns: {"t": [...], "log_snr": [...], "l1": [...], "l2": [...], "x_zero_l1": [...], "x_zero_l2": [...], "images":
    how many}. l1 and l2 are of eps: a predictor of zeros has l2 = 1. The x_zero estimate is clamped, as in sampling.
    """
    totals = {name: torch.zeros(len(timesteps), dtype=torch.float64) for name in ("l1", "l2", "x_zero_l1", "x_zero_l2")}
    seen = torch.zeros((), dtype=torch.long)
    for images, labels, source in evaluation_batches(loader, diffusor.device, max_images):
        classes = labels_for(model, labels, unconditional)
        noise = randn(images.shape, images.device, source)
        for k, timestep in enumerate(timesteps):
            t = torch.full((len(images),), timestep, device=diffusor.device, dtype=torch.long)
            x_t = diffusor.q_sample(images, t, noise)
            eps = diffusor.predict_noise(model, x_t, t, classes).float()
            x_zero = diffusor.predict_x_zero(x_t, t, eps).clamp(-1, 1)
            for of, estimate, truth in (("", eps, noise), ("x_zero_", x_zero, images)):
                totals[f"{of}l1"][k] += F.l1_loss(estimate, truth).item() * len(images)
                totals[f"{of}l2"][k] += F.mse_loss(estimate, truth).item() * len(images)
        seen += len(images)
    seen = int(all_reduce(seen, "images of the losses"))
    means = {name: (all_reduce(total, "losses") / seen).tolist() for name, total in totals.items()}
    return {"t": list(timesteps), "log_snr": diffusor.log_snr[list(timesteps)].tolist(), **means, "images": seen}
