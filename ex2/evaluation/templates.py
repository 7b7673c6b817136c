"""Tells the class of a picture of shapes, without a trained network (2.4)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ex2.data.shapes import SHAPES, draw_shapes
from ex2_train import NOISE_SEED

TEMPLATES = 800  # renders per class


class TemplateClassifier:
    """Tells the class of a picture of the `shapes` set by the rendered template that it resembles most.

    Knows the renderer and no trained network, so it can evaluate the samples of one. Colours are taken out first: each
    picture becomes one channel, its pixels' projection on the line between ground and paint.
    """

    def __init__(self, image_size: int):
        labels = np.repeat(np.arange(len(SHAPES)), TEMPLATES)
        rng = np.random.default_rng(NOISE_SEED)
        self.labels = torch.from_numpy(labels)
        parts = [self.normalised_masks(draw_shapes(part, image_size, rng)) for part in np.array_split(labels, 16)]
        self.templates = torch.cat(parts)

    @staticmethod
    def normalised_masks(images: Tensor) -> Tensor:
        """(N, H*W) of mean 0 and length 1, high on the shape, from (N, 3, H, W) uint8."""
        pixels = images.float() / 255
        if pixels.shape[-1] > 32:  # shapes are as plain at 32x32, and thousands of templates fit the memory
            pixels = F.interpolate(pixels, size=(32, 32), mode="area")
        edges = (pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1])  # 4 x (N, 3, H)
        border = torch.cat(edges, dim=-1)
        contrast = pixels.flatten(2) - border.median(dim=-1, keepdim=True).values  # (N, 3, H*W)
        paint = (contrast * contrast.norm(dim=1, keepdim=True)).mean(dim=-1, keepdim=True)  # (N, 3, 1)
        masks = (contrast * paint).sum(1)  # (N, H*W)
        return F.normalize(masks - masks.mean(-1, keepdim=True), dim=-1)

    def classify(self, images: Tensor) -> Tensor:
        """(N,) labels of (N, 3, H, W) uint8 images."""
        parts = [self.normalised_masks(part.cpu()) @ self.templates.T for part in images.split(500)]
        return self.labels[torch.cat(parts).argmax(dim=1)]

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of the images (N, 3, H, W) uint8 that show what their label (N,) says."""
        return (self.classify(images) == labels.cpu()).float().mean().item()
