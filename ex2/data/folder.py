"""A folder of image files as a data set (2.5)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from ex2.data.images import ImageFiles, read_all, split_off
from ex2.errors import InputError

RESIDENT_LIMIT = 2 * 1024**3  # bytes of images that are kept on the device; larger folders are read while training


def load_folder(data_dir: str | None, image_size: int, seed: int, num_workers: int = 0, square: str = "crop"):
    """Images in `train/<class>/*` and `test/<class>/*`; or in `<class>/*`, a seeded tenth of which is the test set.

    A folder `train` with folders in it is the training set, else it is a class of that name. Images are held in memory
    where they fit `RESIDENT_LIMIT`, else read while training.
    """
    if data_dir is None:
        raise InputError("--dataset folder needs --data_dir: train/<class>/* and test/<class>/*, or <class>/*")
    root = Path(data_dir)
    train_dir, test_dir = root / "train", root / "test"
    split = train_dir.is_dir() and any(entry.is_dir() and entry.name[0] != "." for entry in train_dir.iterdir())
    others = find_classes(root, ("train", "test")) if split else ()
    if others:
        print(f"{root}: {train_dir} holds class folders and is the training set; left out: {', '.join(others)}")
    class_names = find_classes(train_dir if split else root)
    if not class_names or (not split and set(class_names) <= {"train", "val", "test"}):
        raise InputError(f"{root} holds no class folders: put the images into {root / '<class>'}")
    train = find_images(train_dir if split else root, class_names, image_size, square)
    if split and test_dir.is_dir():
        if find_classes(test_dir) != class_names:
            raise InputError(f"the classes in {test_dir} differ from those in {train_dir}: both need the same folders")
        test = find_images(test_dir, class_names, image_size, square)
        # Files come class by class; in random order the first few hundred stand for all of them.
        test = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)))
    else:
        train, test = split_off(train, seed + 1)
    if 3 * image_size**2 * (len(train) + len(test)) <= RESIDENT_LIMIT:
        train, test = read_all(train, num_workers), read_all(test, num_workers)
    return train, test, class_names


def find_classes(folder: Path, leave_out: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names of the folders in `folder`, sorted; says what else lies there. All have to be UTF-8."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: --data_dir must hold train/<class>/*, or <class>/*")
    entries = [entry for entry in folder.iterdir() if entry.name[0] != "." and entry.name not in leave_out]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # what stands for bytes that are no UTF-8
            raise InputError(f"{folder}: the name of the class folder {name!r} is no UTF-8: rename it")
    report_skipped(folder, [entry for entry in entries if not entry.is_dir()], "are in no class folder")
    return tuple(names)


def report_skipped(folder: Path, entries: list[Path], why: str) -> None:
    """Counts what is left out by its kind, and names broken links."""
    if not entries:
        return
    broken = sorted(entry.name for entry in entries if entry.is_symlink() and not entry.exists())
    kinds = Counter(entry.suffix or entry.name for entry in entries if entry.name not in broken)
    if broken:
        kinds[f"broken links: {' '.join(broken[:5])}"] = len(broken)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{folder}: skipped {len(entries)} entries that {why} ({found})")


def find_images(folder: Path, class_names: tuple[str, ...], image_size: int, square: str = "crop") -> ImageFiles:
    """The image files of every class, in sorted order; says how much else was skipped."""
    paths, labels, skipped = [], [], []
    for label, name in enumerate(class_names):
        entries = sorted((folder / name).iterdir())
        found = [path for path in entries if path.suffix.lower() in IMG_EXTENSIONS and path.name[0] != "."]
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"{folder / name} holds no images ({', '.join(IMG_EXTENSIONS)}): fill or remove it")
        skipped += sorted(set(entries) - set(found))
        paths += found
        labels += [label] * len(found)
    report_skipped(folder, skipped, "are no images")
    return ImageFiles(tuple(paths), torch.tensor(labels), image_size, square)
