"""The data set of a name, split into training, validation and test set."""

from __future__ import annotations

import torch

from ex2.data.butterflies import load_butterflies
from ex2.data.folder import load_folder
from ex2.data.images import DataSplits, ImageFiles, split_off
from ex2.data.loader import read_all
from ex2.data.shapes import load_shapes
from ex2.errors import InputError

RESIDENT_LIMIT = 2 * 1024**3  # bytes of images that are kept on the device; larger folders are read while training


def load_splits(
    name, data_dir, image_size, seed, num_workers=0, *, square="crop", cache_dir=None, label_column=None
) -> DataSplits:
    """The data set `name` (one of `DATASETS`); a test or validation set that it lacks is split off its training set.

    Images of a folder are read into memory where they fit `RESIDENT_LIMIT`, else while training.

    Args:
        data_dir: where the data set lies.
        image_size: pixels of a side.
        seed: of the splits.
        num_workers: DataLoader workers that read image files.
        square: one of `SQUARES`, for `folder` and `butterflies`.
        cache_dir: for `butterflies`.
        label_column: for `butterflies`.

    Raises InputError: the data is missing, damaged, too small or not laid out as expected.
    """
    if name == "cifar10":
        from ex2.data.cifar10 import load_cifar10  # here, as importing torchvision takes three seconds

        loaded = load_cifar10(data_dir, image_size)
    elif name == "shapes":
        loaded = load_shapes(image_size)
    elif name == "folder":
        loaded = load_folder(data_dir, image_size, square)
    else:
        loaded = load_butterflies(data_dir, image_size, square, cache_dir, label_column)
    train, val, test, class_names = loaded
    if test is None:
        train, test = split_off(train, seed + 1)
    if val is None:
        train, val = split_off(train, seed)
    check_classes(train, test, class_names)
    parts = [train, val, test]
    if isinstance(train, ImageFiles) and 3 * image_size**2 * sum(map(len, parts)) <= RESIDENT_LIMIT:
        parts = read_all(parts, num_workers)
    return DataSplits(*parts, class_names)


def check_classes(train, test, class_names: tuple[str, ...]) -> None:
    """Names classes without a test image. Raises an InputError that names those without a training image."""
    for part, kind in ((train, "training"), (test, "test")):
        counts = torch.bincount(part.labels, minlength=len(class_names))
        missing = [name for name, count in zip(class_names, counts.tolist()) if not count]
        if not missing:
            continue
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        if kind == "training":
            raise InputError(f"no {kind} image is left of {names}: give more images, or leave the class out")
        print(f"no {kind} image is left of {names}: too few images to hold one out")
