"""The Smithsonian butterflies through the `datasets` library (2.5)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ex2.data.decode import PREPARE_VERSION, as_tensor, prepare_image
from ex2.data.images import ImageSet
from ex2.errors import InputError

BUTTERFLIES = "huggan/smithsonian_butterflies_subset"
RARE = 10  # fewer butterflies of a kind are no class of their own


def load_butterflies(data_dir, image_size: int, square: str, cache_dir, label_column):
    """2.5: (train, None, None, class names) of the Smithsonian butterflies, through the `datasets` library.

    Args:
        data_dir: a parquet file, or a folder of parquet files or of images, in place of the download.
        image_size: pixels of a side.
        square: one of `SQUARES`.
        cache_dir: where the library keeps the download and the resized images.
        label_column: the column that becomes the class; rare values become one class, "other". None: one class for all.

    Raises InputError: the library, the network or the column is missing.
    """
    rows = open_butterflies(data_dir, cache_dir)
    if "image" not in rows.column_names:
        raise InputError(f"the butterflies have no column 'image', only {', '.join(rows.column_names)}")
    labels, class_names = column_labels(rows, label_column)
    # The library keeps prepared images under a hash of these settings. It sees of a function only the name, so the
    # version stands for its code.
    settings = {"image_size": image_size, "square": square, "version": PREPARE_VERSION}
    try:
        rows = rows.select_columns("image").map(prepare_row, fn_kwargs=settings, desc="resizing", with_indices=True)
    except Exception as error:  # as in `read_image`
        raise InputError(f"the butterflies hold an image that can't be read ({error})") from error
    images = torch.stack([as_tensor(row["image"]) for row in rows])
    return ImageSet(images, labels), None, None, class_names


def open_butterflies(data_dir: str | None, cache_dir: str | None):
    """The rows as a `datasets.Dataset`."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError("--dataset butterflies needs datasets: pip install -r requirements-extras.txt") from error
    if data_dir is not None and not Path(data_dir).exists():
        raise InputError(f"no butterflies at {data_dir}: --data_dir takes a parquet file or a folder of images")
    try:
        if data_dir is None:
            return datasets.load_dataset(BUTTERFLIES, cache_dir=cache_dir, split="train")
        files = sorted(map(str, Path(data_dir).rglob("*.parquet"))) if Path(data_dir).is_dir() else [data_dir]
        if files:
            return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, split="train")
        return datasets.load_dataset("imagefolder", data_dir=data_dir, cache_dir=cache_dir, split="all")
    except Exception as error:  # many kinds: no network, no space, a damaged file, an empty folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "with no network, download the set's parquet file elsewhere and give it as --data_dir"
        raise InputError(f"can't load the butterflies from {data_dir or BUTTERFLIES} ({reason}): {advice}") from error


def column_labels(rows, label_column: str | None) -> tuple[Tensor, tuple[str, ...]]:
    """(labels (N,), class names) by the values of a column; fewer than `RARE` images of a value make it "other"."""
    if label_column is None:
        return torch.zeros(len(rows), dtype=torch.long), ("butterfly",)
    if label_column not in rows.column_names:
        raise InputError(f"--label_column {label_column}: the butterflies have {', '.join(rows.column_names)}")
    values, feature = rows[label_column], rows.features[label_column]
    as_text = getattr(feature, "int2str", str)  # a ClassLabel column holds numbers
    names = ["other" if value is None else as_text(value) for value in values]
    counts = Counter(names)
    names = [name if counts[name] >= RARE else "other" for name in names]
    class_names = tuple(sorted(set(names), key=lambda name: (name == "other", name)))
    if class_names == ("other",):
        raise InputError(f"--label_column {label_column}: no value of it has {RARE} images, which a class needs")
    print(f"{len(class_names)} classes by {label_column}, {names.count('other')} images in 'other'")
    return torch.tensor([class_names.index(name) for name in names]), class_names


def prepare_row(row: dict, index: int, image_size: int, square: str, version: int) -> dict:
    """The row with its image prepared by `prepare_image`; `version` only tells the library's cache."""
    try:
        return {"image": prepare_image(row["image"], image_size, square)}
    except Exception as error:
        raise ValueError(f"row {index}: {error}") from error
