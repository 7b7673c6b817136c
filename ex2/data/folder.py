"""A folder of image files as a data set (2.5)."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import torch

from ex2.data.images import ImageFiles
from ex2.data.sets import UNLABELLED
from ex2.errors import InputError

PARTS = ("train", "val", "test")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_folder(data_dir: str | None, image_size: int, square: str = "crop"):
    """(train, val or None, test or None, class names) of a folder of image files.

    It holds `train/<class>/*`, and beside it `val/<class>/*` and `test/<class>/*` or neither; or `<class>/*`. Images
    without class folders are one class. A folder `train` beside other classes, with no folders in it, is a class.

    Raises InputError: the folder is laid out in another way, or classes of its parts differ.
    """
    if data_dir is None:
        raise InputError("--dataset folder needs --data_dir: train/<class>/* and test/<class>/*, or <class>/*")
    root = Path(data_dir)
    folders = find_classes(root)
    others = [name for name in folders if name not in PARTS]
    parts = {"train": root}
    if "train" in folders and (not others or any(entry.is_dir() for entry in (root / "train").glob("[!.]*"))):
        parts = {name: root / name for name in PARTS if name in folders}
        if others:
            print(f"{root}: {root / 'train'} is the training set; left out: {', '.join(others)}")
    elif folders and not others:
        raise InputError(f"{root} holds {' and '.join(folders)}, and no train: put the images into {root / 'train'}")
    sets, classes = dict.fromkeys(PARTS), None
    for name, folder in parts.items():
        found = (folders if folder == root else find_classes(folder)) or {UNLABELLED[0]: [folder]}
        classes = classes or tuple(found)
        if tuple(found) != classes:
            raise InputError(f"the classes in {folder} differ from those in {parts['train']}: both need the same")
        sets[name] = find_images(root, folder, found, image_size, square)
    return *sets.values(), classes


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """{class: its folders}, sorted; where there are some, says what lies beside them. All names have to be UTF-8.

    A name has several forms in Unicode, and a Mac takes another one than Linux: here they are one class.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: --data_dir must hold train/<class>/*, or <class>/*")
    entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
    classes = defaultdict(list)
    for entry in entries:
        if not entry.is_dir():
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):  # what stands for bytes that are no UTF-8
            raise InputError(f"{folder}: the name of the class folder {entry.name!r} is no UTF-8: rename it")
        classes[unicodedata.normalize("NFC", entry.name)].append(entry)
    if classes:
        report_skipped(folder, [entry for entry in entries if not entry.is_dir()], "are in no class folder")
    return dict(sorted(classes.items()))


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


def find_images(root: Path, folder: Path, classes: dict[str, list[Path]], image_size: int, square: str) -> ImageFiles:
    """The image files of every class in one part of the data folder; says how much else was skipped.

    Their order is drawn by their names, so the first few hundred stand for all classes.
    """
    paths, labels, skipped = [], [], []
    for label, folders in enumerate(classes.values()):
        entries = sorted(entry for folder in folders for entry in folder.iterdir())
        found = [path for path in entries if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != "."]
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"{folders[0]} holds no images ({', '.join(IMAGE_ENDINGS)}): fill or remove it")
        skipped += sorted(set(entries) - set(found))
        paths += found
        labels += [label] * len(found)
    report_skipped(folder, skipped, "are no images")
    files = ImageFiles(tuple(paths), torch.tensor(labels), image_size, square, root)
    draws = files.draw(seed=-1)  # of no split
    return files.subset(torch.tensor(sorted(range(len(files)), key=draws.__getitem__)))
