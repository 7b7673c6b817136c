"""The data set of a name, split into training, validation and test set."""

from __future__ import annotations

from ex2.data.butterflies import load_butterflies
from ex2.data.cifar10 import load_cifar10
from ex2.data.folder import load_folder
from ex2.data.images import DataSplits, split_off
from ex2.data.shapes import load_shapes


def load_splits(
    name, data_dir, image_size, seed, num_workers=0, *, square="crop", cache_dir=None, label_column=None
) -> DataSplits:
    """The data set `name` (one of `DATASETS`) at `image_size`, its training images split 90/10 into train and val.

    `square` is for `folder` and `butterflies`, `cache_dir` and `label_column` for `butterflies` alone.

    Raises InputError: the data is missing, damaged or not laid out as expected.
    """
    if name == "cifar10":
        loaded = load_cifar10(data_dir, image_size)
    elif name == "shapes":
        loaded = load_shapes(image_size)
    elif name == "folder":
        loaded = load_folder(data_dir, image_size, seed, num_workers, square)
    else:
        loaded = load_butterflies(data_dir, image_size, seed, square, cache_dir, label_column)
    train, test, class_names = loaded
    train, val = split_off(train, seed)
    return DataSplits(train, val, test, class_names)
