"""Sets of images, in memory or as files that are read when asked for (2.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ex2.errors import InputError
from ex2.machine.job import ignore_signals

EXIF_ORIENTATION = 0x0112
EXIF_TURNS = dict(  # what undoes an orientation of 2, 3, ...
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2)
)
HELD_OUT = 0.1  # share of the training images that become the validation set


def to_model_range(images: Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def reverse_transform(images: Tensor) -> Tensor:
    """Model outputs to uint8 pixels: -1 -> 0, 0 -> 128, 1 -> 255, rounded, values outside clamped. Any shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class ImageSet(Dataset):
    """Images (N, 3, H, W) in uint8 with labels (N,), in memory; as a Dataset it yields (float image, label)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return to_model_range(self.images[index]), self.labels[index]

    def subset(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files that are read, resized and cropped when asked for; yields (float image (3, H, W), label).

    Indexed by a number, or by (number, whether to mirror the image).
    """

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int
    square: str = "crop"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, mirror = index if isinstance(index, tuple) else (index, False)
        image = read_image(self.paths[index], self.image_size, self.square)
        return to_model_range(image.flip(-1) if mirror else image), self.labels[index]

    def subset(self, indices: Tensor) -> ImageFiles:
        paths = tuple(self.paths[i] for i in indices.tolist())
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices])


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test set of one data set. Only training images are ever flipped."""

    train: ImageSet | ImageFiles
    val: ImageSet | ImageFiles
    test: ImageSet | ImageFiles
    class_names: tuple[str, ...]


def split_off(dataset, seed: int, share: float = HELD_OUT):
    """(the rest, a random `share` of the images), by a seeded permutation.

    Raises InputError: one of the two would be empty.
    """
    held_out = round(len(dataset) * share)
    if held_out == 0 or held_out == len(dataset):
        raise InputError(f"{len(dataset)} images are too few to hold {share:.0%} of them out: give at least 10")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.subset(order[held_out:]), dataset.subset(order[:held_out])


def read_image(path: Path, image_size: int, square: str = "crop") -> Tensor:
    """(3, image_size, image_size) uint8 from an image file, by `prepare_image`; an InputError names a damaged one."""
    try:
        with Image.open(path) as image:
            return TF.pil_to_tensor(prepare_image(image, image_size, square))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise InputError(f"{path} can't be read as an image ({error}): repair or delete it") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says. Other damage in the metadata does not matter."""
    image.load()  # what is wrong with the pixels shows here; of a TIFF Pillow turns them, and takes the tag away
    try:
        turn = EXIF_TURNS.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:  # the metadata are damaged, and may be: the pixels decide
        turn = None
    return image if turn is None else image.transpose(Image.Transpose[turn])


def prepare_image(image: Image.Image, image_size: int, square: str = "crop") -> Image.Image:
    """An RGB image of image_size x image_size: upright, on white, `square` of `SQUARES`; a ValueError for 32 bits."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError(f"its pixels are of mode {image.mode}, 32 bits of unknown range: save them with 8 or 16 bits")
    image = upright(image)
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
    return TF.center_crop(TF.resize(image, image_size, antialias=True), image_size)


def read_all(files: ImageFiles, num_workers: int) -> ImageSet:
    """Every file, decoded into memory."""
    loader = DataLoader(files, batch_size=64, num_workers=num_workers, worker_init_fn=ignore_signals)
    batches = [reverse_transform(images) for images, _ in tqdm(loader, "reading images", leave=False, disable=None)]
    return ImageSet(torch.cat(batches), files.labels)
