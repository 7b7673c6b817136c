"""Optimiser, learning rate and the EMA of the weights (2.1, 2.2 training)."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor
from torch.optim import AdamW

EMA_RAMP = 0.1  # the EMA half-life never exceeds this fraction of the images seen (EDM's ramp-up)


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
    optimizer._warned_capturable_if_run_uncaptured = True  # warm-up steps run uncaptured on purpose
    return optimizer


def set_learning_rate(optimizer, lr: float) -> None:
    """Sets the learning rate of the next step, in an optimiser of `build_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def learning_rate(peak: float, step: int, total_steps: int, warmup_steps: int = 0, time_fraction: float = 0.0) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up to `peak`, then cosine decay to zero at the end.

    Args:
        peak: maximum learning rate.
        step: number of the step, from 0.
        total_steps: steps of the whole training.
        warmup_steps: capped at a tenth of all steps.
        time_fraction: elapsed part of --max_minutes; the larger of both progresses counts.
    """
    warmup = min(warmup_steps, total_steps // 10)
    rise = min(1.0, (step + 1) / (warmup + 1))
    done = max((step - warmup) / max(1, total_steps - warmup), time_fraction)
    return peak * (rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))))


class EMA:  # swa_utils.AveragedModel reads a counter on the CPU at every update: no GPU could replay that
    """The exponential moving average (EMA) of the weights, held by a copy of the model.

    Its half-life is `ema_images`, or a tenth of the images seen so far. The tenth matters for short runs: with a
    constant decay of 0.9999 the EMA of 750 steps would be 93% initial weights. It is the ramp-up of EDM (Karras et al.
    2022, https://arxiv.org/abs/2206.00364), at twice its length.
    """

    def __init__(self, model, ema_images: float, batch_size: int):
        self.model = deepcopy(model).requires_grad_(False)
        self.weights = list(self.model.parameters())
        self.ema_images, self.batch_size = ema_images, batch_size
        self.weight = torch.ones((), device=self.weights[0].device)  # of the new weights in the average

    def set_step(self, step: int) -> None:
        """Sets the weight of the new weights for the update of optimiser step 0, 1, ..."""
        half_life = min(self.ema_images, EMA_RAMP * (step + 1) * self.batch_size)
        self.weight.fill_(1 - 0.5 ** (self.batch_size / half_life))

    @torch.no_grad()
    def update(self, weights: list[Tensor]) -> None:
        """average += weight * (weights - average)."""
        difference = torch._foreach_sub(weights, self.weights)
        torch._foreach_mul_(difference, self.weight)
        torch._foreach_add_(self.weights, difference)
