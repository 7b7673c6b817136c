"""The loss of an epoch while it goes on, for the bar and the log (2.1)."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from ex2.errors import RunError
from ex2.machine.processes import mean_over_processes


class LossMeter:
    """Loss of one epoch as mean over images and processes; reads the device once per window, not once per step.

    Args:
        epoch: number of the epoch, for messages.
        images_in: number of a batch -> its images over all processes; None: this process has them all.
        log: called with the mean loss and the mean gradient norm of every window of steps.
    """

    def __init__(self, epoch: int, images_in: Callable[[int], int] | None = None, log: Callable | None = None):
        self.epoch, self.images_in, self.log = epoch, images_in, log
        self.window: list[tuple[Tensor, Tensor, int]] = []  # (loss, gradient norm, images) of steps not summed up yet
        self.steps, self.images, self.total = 0, 0, 0.0  # summed up

    @property
    def all_steps(self) -> int:
        """Steps of the epoch until now."""
        return self.steps + len(self.window)

    @property
    def mean(self) -> float:
        return self.total / self.images

    def add(self, loss: Tensor, grad_norm: Tensor, images: int) -> None:
        """Takes in a step on `images` images."""
        images = images if self.images_in is None else self.images_in(self.all_steps)
        self.window.append((mean_over_processes(loss), grad_norm, images))

    def read_window(self, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, gradient norms, images) of the window, one entry per step; `lr` is for the message.

        Raises RunError: a loss or a gradient is not finite.
        """
        losses, norms, counts = zip(*self.window)
        losses, norms, counts = torch.stack(losses).cpu(), torch.stack(norms).cpu(), torch.tensor(counts)
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            step = self.steps + int(finite.int().argmin()) + 1
            where = f"step {step} of epoch {self.epoch + 1} (learning rate {lr:.2g})"
            advice = "lower --lr or --grad_clip, or give --amp off, and choose a new --run_name"
            what = f"the loss or its gradient is not finite in {where}: {advice}"
            raise RunError(f"{what}; the last checkpoint is untouched")
        return losses, norms, counts

    def close_window(self, lr: float) -> float:
        """Sums up the steps of the window, which starts anew; returns their mean loss over the images.

        Raises RunError: a loss or a gradient of the window is not finite.
        """
        losses, norms, counts = self.read_window(lr)
        window_total = (losses.double() * counts).sum().item()
        self.total += window_total
        self.images += int(counts.sum())
        self.steps += len(counts)
        self.window.clear()
        loss = window_total / int(counts.sum())
        if self.log is not None:
            self.log(loss, norms.mean().item())
        return loss

    def state_dict(self, lr: float) -> dict:
        """What a checkpoint keeps of the epoch that is going on.

        Raises RunError: a loss or a gradient of the window is not finite.
        """
        if self.window:
            self.read_window(lr)
        window = [(float(loss), float(norm), images) for loss, norm, images in self.window]
        return {"steps": self.steps, "images": self.images, "total": self.total, "window": window}

    def load_state_dict(self, saved: dict) -> None:
        """Restores what `state_dict` returned."""
        self.steps, self.images, self.total = saved["steps"], saved["images"], saved["total"]
        self.window = [(torch.tensor(loss), torch.tensor(norm), images) for loss, norm, images in saved["window"]]


def show_loss(progress: tqdm, meter: LossMeter, optimizer) -> None:
    """Shows the loss of the last window beside the bar. Without a terminal, as in a batch job, it prints a line."""
    loss = meter.close_window(float(optimizer.param_groups[0]["lr"]))
    progress.set_postfix(loss=f"{loss:.4f}")
    if progress.disable:
        print(f"epoch {meter.epoch + 1}, step {meter.steps}/{progress.total or meter.steps}: loss {loss:.4f}")
