"""Sets of images, in memory or as files that are read when asked for; their splits and fingerprints (2.1)."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ex2.data.decode import read_image
from ex2.errors import InputError

HELD_OUT = 0.1  # fraction of the training images that becomes the validation set, and the test set where there is none
BLOCK, BLOCKS = 4096, 16  # bytes, and how many of them a fingerprint reads of a large file


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
    root: Path = Path()  # the data folder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, mirror = index if isinstance(index, tuple) else (index, False)
        image = read_image(self.paths[index], self.image_size, self.square)
        return to_model_range(image.flip(-1) if mirror else image), self.labels[index]

    def subset(self, indices: Tensor) -> ImageFiles:
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()), labels=self.labels[indices])

    def names(self) -> list[bytes]:
        """Each file's path from the data folder, the same on every system: with "/", in Unicode's composed form."""
        relative = (os.path.relpath(path, self.root).replace(os.sep, "/") for path in self.paths)
        return [os.fsencode(unicodedata.normalize("NFC", name)) for name in relative]

    def draw(self, seed: int) -> list[float]:
        """A random number in [0, 1) for each file, by the seed and its own name alone."""
        digests = (hashlib.sha256(b"%d " % seed + name).digest() for name in self.names())
        return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test set of one data set. Only training images are ever flipped."""

    train: ImageSet | ImageFiles
    val: ImageSet | ImageFiles
    test: ImageSet | ImageFiles
    class_names: tuple[str, ...]


def split_off(dataset, seed: int):
    """(the rest, a random tenth): of an `ImageSet` by a seeded permutation, of `ImageFiles` by `hold_out_by_name`.

    Raises InputError: one of the two would be empty.
    """
    if isinstance(dataset, ImageFiles):
        held_out = hold_out_by_name(dataset, seed)
        rest, held = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        held, rest = order.tensor_split([round(len(dataset) * HELD_OUT)])
    if not len(rest) or not len(held):
        raise InputError(f"{len(dataset)} images are too few to hold some of them out: give more of each class")
    return dataset.subset(rest), dataset.subset(held)


def hold_out_by_name(files: ImageFiles, seed: int) -> Tensor:
    """(N,) bool: whether a file is held out. Its own name decides, so adding or removing files moves no other.

    Two exceptions: a class of two or more files holds out one at least, and every class keeps one.
    """
    draws, labels = files.draw(seed), files.labels.tolist()
    classes = defaultdict(list)
    for index in sorted(range(len(files)), key=draws.__getitem__):
        classes[labels[index]].append(index)
    held_out = torch.zeros(len(files), dtype=torch.bool)
    for members in classes.values():
        count = sum(draws[index] < HELD_OUT for index in members)
        held_out[members[: min(max(count, 1), len(members) - 1)]] = True
    return held_out


def join(*datasets):
    """The images of several data sets of one kind, one after the other."""
    labels = torch.cat([dataset.labels for dataset in datasets])
    if isinstance(datasets[0], ImageSet):
        return ImageSet(torch.cat([dataset.images for dataset in datasets]), labels)
    return replace(datasets[0], paths=tuple(path for dataset in datasets for path in dataset.paths), labels=labels)


def digest_images(dataset) -> list[bytes]:
    """A SHA-256 for each image: of its label and all of its pixels, or of its file's name and `file_sample`."""
    if isinstance(dataset, ImageSet):
        contents = (image.numpy().tobytes() for image in dataset.images)
    else:
        how = f"{dataset.image_size} {dataset.square} ".encode()
        contents = (how + name + file_sample(path) for name, path in zip(dataset.names(), dataset.paths))
    # Bytes as in earlier versions: the order of `training_images` follows from them, and with it the classifier.
    labels = (label.to_bytes(1 + label.bit_length() // 8, "big") for label in dataset.labels.tolist())
    return [hashlib.sha256(data + label).digest() for data, label in zip(contents, labels)]


def file_sample(path: Path) -> bytes:
    """The size of a file and its bytes; of more than 64 kB only 16 blocks from its start to its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= BLOCK * BLOCKS:
            return b"%d " % size + file.read()
        content = b"%d " % size
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            content += file.read(BLOCK)
    return content


def fingerprint_of(splits: DataSplits) -> dict[str, str]:
    """{part: its number of images and a hash of all of them, in any order}: what a run was trained on."""
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    return {name: f"{len(part)} images {hash_digests(digest_images(part))}" for name, part in parts.items()}


def hash_digests(digests: list[bytes]) -> str:
    """Twelve hexadecimal digits for the digests of images, in any order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:12]


def training_images(splits: DataSplits) -> tuple[ImageSet | ImageFiles, str]:
    """(train and val together, a hash of them), in an order that does not depend on how the seed split them."""
    whole = join(splits.train, splits.val)
    digests = digest_images(whole)
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return whole.subset(torch.tensor(order)), hash_digests(digests)
