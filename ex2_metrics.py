"""How good is the model? Loss over the timesteps, and the class accuracy of generated shapes (2.2 e)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ex2_diffusion import Diffusion, check_images, image_generators
from ex2_shapes import SHAPES, draw_shapes

NOISE_SEED = 20_201_216  # of every evaluation, so that figures of different runs are comparable


@torch.no_grad()
def loss_over_timesteps(
    model, loader: Iterable, diffusor: Diffusion, times: Sequence[int], *, max_images: int | None = None
) -> dict:
    """Mean l1 and l2 error of the predicted noise at each of `times`, over the first `max_images` images of `loader`.

    Image i gets the same noise at every time, in every run and at any batch size, so the figures of two models differ
    by the models alone. Call it with the model in eval mode.

    Args:
        model: (x_t, t) -> eps; (x_t, t, classes) -> eps where its `class_free_guidance` is true.

    Returns: {"t": [...], "l1": [...], "l2": [...], "images": how many}; l2 of a predictor of zeros is 1.
    """
    conditional = getattr(model, "class_free_guidance", False)
    l1, l2 = torch.zeros(len(times), dtype=torch.float64), torch.zeros(len(times), dtype=torch.float64)
    seen = 0
    for images, labels in tqdm(loader, "evaluating", leave=False, disable=None):
        if max_images is not None:
            images, labels = images[: max_images - seen], labels[: max_images - seen]
        images, labels = images.to(diffusor.device), labels.to(diffusor.device)
        check_images(images)
        noise = [torch.randn(images.shape[1:], generator=g) for g in image_generators(NOISE_SEED, seen, len(images))]
        noise = torch.stack(noise).to(diffusor.device)  # (B, C, H, W)
        for k, time in enumerate(times):
            t = torch.full((len(images),), time, device=diffusor.device, dtype=torch.long)
            x_t = diffusor.q_sample(images, t, noise)
            eps = model(x_t, t, labels) if conditional else model(x_t, t)
            l1[k] += F.l1_loss(eps.float(), noise).item() * len(images)
            l2[k] += F.mse_loss(eps.float(), noise).item() * len(images)
        seen += len(images)
        if seen == max_images:
            break
    return {"t": list(times), "l1": (l1 / seen).tolist(), "l2": (l2 / seen).tolist(), "images": seen}


class ShapesOracle:
    """Tells the class of a picture of the `shapes` set: that of the rendered template it resembles most.

    Knows the renderer and no trained network, so it can judge the samples of one. Colours are taken out first: each
    picture becomes one channel, its pixels' projection on the line between ground and paint.

    Args:
        image_size: pixels.  templates: renders per class.
    """

    def __init__(self, image_size: int, templates: int = 800):
        labels = np.repeat(np.arange(len(SHAPES)), templates)
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
        border = torch.cat(
            (pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]), dim=-1
        )  # (N, 3, 4H)
        contrast = pixels.flatten(2) - border.median(dim=-1, keepdim=True).values  # (N, 3, H*W)
        paint = (contrast * contrast.norm(dim=1, keepdim=True)).mean(dim=-1, keepdim=True)  # (N, 3, 1)
        masks = (contrast * paint).sum(1)  # (N, H*W)
        return F.normalize(masks - masks.mean(-1, keepdim=True), dim=-1)

    def classify(self, images: Tensor) -> Tensor:
        """(N,) labels of (N, 3, H, W) uint8 images."""
        parts = [self.normalised_masks(part.cpu()) @ self.templates.T for part in images.split(500)]
        return self.labels[torch.cat(parts).argmax(dim=1)]

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images (N, 3, H, W) uint8 that show what their label (N,) says."""
        return (self.classify(images) == labels.cpu()).float().mean().item()
