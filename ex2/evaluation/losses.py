"""Losses of training images, beside the best possible ones (2.2 e)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ex2.data.images import ImageSet, to_model_range
from ex2.data.loader import make_loader
from ex2.settings.config import Config
from ex2_diffusion import Diffusion, extract
from ex2_train import loss_over_timesteps

OPTIMAL_IMAGES = 64  # training images whose loss is compared with the best possible one


class IdealDenoiser:
    """The best possible noise predictor on its own images: eps from the posterior mean of x_zero.

    By Bayes and Eq. 5 each image x_i weighs exp(-|x_t - sqrt(alphas_bar) x_i|^2 / (2 (1 - alphas_bar))). It only knows
    the training set, so a trained model beats it on test images.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,), for a predictor that is given the class; None: it isn't.
    """

    def __init__(self, diffusor: Diffusion, images: Tensor, labels: Tensor | None = None):
        self.diffusor, self.images = diffusor, images
        self.labels = None if labels is None else labels.to(diffusor.device)
        self.class_free_guidance = labels is not None

    def gallery(self) -> Iterator[Tensor]:
        """The images in float64, (about 1000, D) at a time: float32 would mix up neighbours at small t."""
        for images in self.images.split(1000):
            yield to_model_range(images.to(self.diffusor.device)).double().flatten(1)

    def __call__(self, x_t: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        alphas_bar = extract(self.diffusor.alphas_bar.double(), t, (len(t), 1))
        signal, points = alphas_bar.sqrt(), x_t.double().flatten(1)
        logits = [signal * points @ part.T - 0.5 * alphas_bar * part.square().sum(1) for part in self.gallery()]
        logits = torch.cat(logits, dim=1) / (1 - alphas_bar)  # (B, N)
        if self.labels is not None:
            logits = logits.masked_fill(self.labels != classes[:, None], -math.inf)
        weights = logits.softmax(dim=1).split(1000, dim=1)
        x_zero = sum(part @ images for part, images in zip(weights, self.gallery()))
        return ((points - signal * x_zero) / (1 - alphas_bar).sqrt()).view_as(x_t).float()


def losses_of_training(model, train: ImageSet, diffusor: Diffusion, config: Config, timesteps: Sequence[int]) -> dict:
    """Losses of some training images: "train", the model's, and "optimal", the ideal denoiser's.

    On average over all training images no model is below the optimal loss.
    """
    count = 1 if config.dry_run else min(config.eval_images, OPTIMAL_IMAGES)
    loader = make_loader(train.subset(torch.arange(min(count, len(train)))), OPTIMAL_IMAGES, diffusor.device)
    images, labels = train.images, train.labels
    if config.flip:
        images, labels = torch.cat((images, images.flip(-1))), labels.repeat(2)
    optimal = IdealDenoiser(diffusor, images, labels if config.class_free_guidance else None)
    return {
        "train": loss_over_timesteps(model, loader, diffusor, timesteps),
        "optimal": loss_over_timesteps(optimal, loader, diffusor, timesteps),
    }
