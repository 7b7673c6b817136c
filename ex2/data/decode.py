"""One image file as pixels: upright, on white, square, RGB."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ex2.errors import InputError, ReadingError


def read_image(path: Path, image_size: int, square: str = "crop") -> Tensor:
    """(3, image_size, image_size) uint8 from an image file, by `prepare_image`.

    Raises:
        InputError: the file is damaged, or has more pixels than Pillow's limit (89 million).
        ReadingError: the memory is full.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_tensor(prepare_image(image, image_size, square))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is too large ({str(error).split(',')[0]}): make it smaller") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the latter is torch's
            raise ReadingError(
                f"the memory is full, {path} can't be read: free some, or lower --num_workers"
            ) from error
        raise InputError(f"{path} can't be read as an image ({error}): repair or delete it") from error


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 from an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def prepare_image(image: Image.Image, image_size: int, square: str = "crop") -> Image.Image:
    """The image in RGB at image_size x image_size; whoever changes its pixels raises `PREPARE_VERSION`.

    Args:
        image: of any mode and size; it is turned in place.
        image_size: pixels of a side.
        square: one of `SQUARES`: the centre of the image ("crop"), or all of it with white bars ("pad").

    Raises ValueError: the pixels have 32 bits of unknown range.
    """
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError(f"its pixels are of mode {image.mode}, 32 bits of unknown range: save them with 8 or 16 bits")
    image.load()  # damaged pixels raise here
    with suppress(Exception):  # Damaged metadata don't matter: `in_place` turns the pixels before it rewrites them.
        ImageOps.exif_transpose(image, in_place=True)
    if sixteen_bits:  # convert("RGB") would clip them
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if square == "pad":
        scale = image_size / max(image.size)
        inner = [max(1, round(side * scale)) for side in image.size]  # Pillow 11 alone would make a thin side 0 pixels
        image = image.resize(inner, Image.Resampling.BICUBIC)
        return ImageOps.pad(image, (image_size, image_size), color="white")
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)  # never resizes what it crops


PREPARE_VERSION = 2  # part of the key under which the `datasets` library keeps prepared images
