"""Where the noise of samples and of evaluations comes from: image i has the same in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Union

import torch
from torch import Tensor


class ImageNoise:
    """The noise of images `first` .. `first + count - 1` of the run with this seed, drawn on the device.

    The same for an image at any batch size: 16 in a row share a generator, and a batch takes its rows.
    """

    block = 16

    def __init__(self, seed: int, first: int, count: int, device="cpu"):
        blocks = range(first // self.block, -(-(first + count) // self.block))
        # torch's CPU generator uses 32 bits of its seed; the factor keeps the images of neighbouring seeds apart.
        seeds = [(seed * 1_000_003 + number) % 2**32 for number in blocks]
        self.generators = [torch.Generator(device).manual_seed(number) for number in seeds]
        self.rows = slice(first - blocks.start * self.block, first - blocks.start * self.block + count)

    def draw(self, shape: Sequence[int], kind: Callable = torch.randn) -> Tensor:
        """(count, ...) like `shape`, normal or, by `kind=torch.rand`, uniform; other numbers at every call."""
        size = (self.block, *shape[1:])
        noise = torch.cat([kind(size, generator=g, device=g.device) for g in self.generators])[self.rows]
        if len(noise) != shape[0]:
            raise ValueError(f"the noise of {len(noise)} images for a batch of {shape[0]}")
        return noise


NoiseSource = Union[torch.Generator, ImageNoise, None]


def randn(shape: Sequence[int], device: torch.device, generator: NoiseSource = None) -> Tensor:
    """Standard normal noise on `device`: from torch's global generator, another one, or that of certain images."""
    if isinstance(generator, ImageNoise):
        return generator.draw(shape).to(device)
    return torch.randn(*shape, generator=generator, device=device if generator is None else generator.device).to(device)


def sample_in_batches(diffusor, model, count, batch_size, seed, *, classes=None, first=0, channels=3, **sampling):
    """Yields `count` images in batches of at most `batch_size`, on the CPU; image i depends on seed and i alone.

    Args:
        classes: (count,) labels or None.
        first: number i of the first image.
        sampling: as in `Diffusion.sample_trajectory`.
    """
    for done in range(0, count, batch_size):
        size, own = min(batch_size, count - done), None if classes is None else classes[done : done + batch_size]
        noise = ImageNoise(seed, first + done, size, diffusor.device)
        yield diffusor.sample(model, diffusor.img_size, size, channels, classes=own, generator=noise, **sampling).cpu()
