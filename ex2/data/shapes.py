"""Draws the embedded data set: anti-aliased shapes of ten classes, at any size, from a seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ex2.data.images import ImageSet

SHAPES_COUNT = {"train": 10_000, "test": 2_000}  # of which the usual 10% of train become val
SHAPES_SEED = 0


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to an upright box around 0 (exact inside and beside it, a bound at its corners)."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def polygon(x: np.ndarray, y: np.ndarray, radii: tuple[float, ...], count: int) -> np.ndarray:
    """Signed distance to a polygon; Quilez, https://iquilezles.org/articles/distfunctions2d.

    Its `count` corners are around 0, the first at the top, their distances cycling through `radii`; y points down.
    """
    angles, lengths = np.arange(count) / count * 2 * np.pi, np.resize(radii, count)
    corners = np.stack((lengths * np.sin(angles), -lengths * np.cos(angles)), axis=1)  # (count, 2)
    squared, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0)):
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        squared = np.minimum(squared, (x - ax - along * (bx - ax)) ** 2 + (y - ay - along * (by - ay)) ** 2)
        if ay != by:  # even-odd rule: does a ray to the right cross this edge?
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def bars(x: np.ndarray, y: np.ndarray, half_length: float, half_width: float) -> np.ndarray:
    """Signed distance to a bar along x and one along y."""
    return np.minimum(box(x, y, half_length, half_width), box(x, y, half_width, half_length))


# Signed distances of the points (x, y) to the outline of each shape, which fits the unit circle; negative inside.
DISTANCES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "triangle": lambda x, y: polygon(x, y, (1.0,), 3),
    "diamond": lambda x, y: polygon(x, y, (1.0, 0.6), 4),
    "plus": lambda x, y: bars(x, y, 0.95, 0.3),
    "cross": lambda x, y: bars((x + y) / np.sqrt(2), (x - y) / np.sqrt(2), 1.0, 0.25),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.2,
    "star": lambda x, y: polygon(x, y, (1.0, 0.42), 10),
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.8 - np.hypot(x - 0.5, y)),
    "stripes": lambda x, y: np.minimum.reduce([box(x, y - middle, 0.9, 0.18) for middle in (-0.7, 0, 0.7)]),
}
SHAPES = tuple(DISTANCES)


def draw_shapes(labels: np.ndarray, image_size: int, rng: np.random.Generator) -> Tensor:
    """One anti-aliased shape per label, of random colours, size, place and tilt, bright on dark ground.

    Returns: (N, 3, image_size, image_size) uint8.
    """
    from matplotlib.colors import hsv_to_rgb  # here, as importing it takes a tenth of a second

    count = len(labels)
    radius = rng.uniform(0.6, 0.9, (count, 1, 1))  # in half image sizes
    centre = rng.uniform(-1, 1, (count, 2, 1, 1)) * (0.95 - radius[:, None])
    tilt = rng.uniform(-0.2, 0.2, (count, 1, 1))  # radians: a square stays unlike a diamond
    paint = hsv_to_rgb(rng.uniform((0, 0.35, 0.8), (1, 1, 1), (count, 3)))
    ground = hsv_to_rgb(rng.uniform((0, 0, 0.05), (1, 1, 0.35), (count, 3)))

    pixels = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    images = np.empty((count, 3, image_size, image_size), np.uint8)
    for chunk in np.array_split(np.arange(count), math.ceil(count * image_size**2 / 2**18)):
        x = (pixels[None, None, :] - centre[chunk, 0]) / radius[chunk]  # (n, S, S) after the next two lines
        y = (pixels[None, :, None] - centre[chunk, 1]) / radius[chunk]
        cos, sin = np.cos(tilt[chunk]), np.sin(tilt[chunk])
        x, y = cos * x + sin * y, cos * y - sin * x
        distance = np.empty(x.shape)
        for label, distance_of in enumerate(DISTANCES.values()):
            mine = labels[chunk] == label
            distance[mine] = distance_of(x[mine], y[mine])
        # A pixel is 2 / image_size wide: its cover falls from 1 to 0 while the edge crosses it.
        cover = np.clip(0.5 - distance * radius[chunk] * image_size / 2, 0, 1)[:, None]
        colours = cover * paint[chunk, :, None, None] + (1 - cover) * ground[chunk, :, None, None]
        images[chunk] = np.rint(colours * 255)
    return torch.from_numpy(images)


def load_shapes(image_size: int) -> tuple[ImageSet, None, ImageSet, tuple[str, ...]]:
    """(train, None, test, class names) of the embedded data set: coloured shapes, the same ones in every run."""
    sets = []
    for offset, count in enumerate(SHAPES_COUNT.values()):
        rng = np.random.default_rng((SHAPES_SEED, offset))
        labels = rng.permutation(np.arange(count) % len(SHAPES))
        sets.append(ImageSet(draw_shapes(labels, image_size, rng), torch.from_numpy(labels).long()))
    return sets[0], None, sets[1], SHAPES
