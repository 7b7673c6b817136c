"""CIFAR-10, found on disk or downloaded (2.1)."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision.transforms.functional as TF
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from ex2.data.images import ImageSet
from ex2.errors import InputError

COURSE_CIFAR10 = Path("/proj/aimi-adl/CIFAR10/")


def load_cifar10(data_dir: str | None, image_size: int) -> tuple[ImageSet, None, ImageSet, tuple[str, ...]]:
    """(train, None, test, class names) of CIFAR-10.

    It comes from `data_dir`, $CIFAR10_ROOT, the course's folder or ./data, and is downloaded where none has it.
    """
    root = find_cifar10(data_dir)
    print(f"CIFAR-10 from {root}")
    sets = []
    for train in (True, False):
        data = CIFAR10(root, train=train, download=False)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        if image_size != 32:
            images = torch.cat([TF.resize(part, [image_size] * 2, antialias=True) for part in images.split(5000)])
        sets.append(ImageSet(images, torch.tensor(data.targets)))
    return sets[0], None, sets[1], tuple(data.classes)


def find_cifar10(data_dir: str | None) -> Path:
    """The first folder that holds CIFAR-10, extracted or as archive; downloads it where there is none.

    Raises InputError: an archive or batch file is damaged, or there is no data set and no network.
    """
    chosen = data_dir or os.environ.get("CIFAR10_ROOT")
    places = [Path(chosen).expanduser()] if chosen else []
    places += [COURSE_CIFAR10, Path("data")]
    if chosen and (places[0] / CIFAR10.train_list[0][0]).is_file():  # the folder of the batches itself
        if places[0].resolve().name != CIFAR10.base_folder:
            raise InputError(f"{chosen} holds the batches of CIFAR-10: name it {CIFAR10.base_folder}, give its parent")
        places[0] = places[0].resolve().parent
    for place in places:
        archive, unpacked = place / CIFAR10.filename, (place / CIFAR10.base_folder).is_dir()
        if not unpacked and not archive.is_file():
            continue
        if not unpacked:
            place = unpack(archive)
        check_cifar10_files(place)
        return place
    target = places[0] if chosen else Path("data")
    try:
        CIFAR10(target, download=True)
    except (URLError, OSError, RuntimeError) as error:
        looked = ", ".join(str(place / CIFAR10.base_folder) for place in places)
        advice = f"give --data_dir or $CIFAR10_ROOT, copy {CIFAR10.filename} into {target}, or take --dataset shapes"
        what = f"CIFAR-10 not found (looked for {looked}) and the download failed ({error})"
        raise InputError(f"{what}: {advice}") from error
    return target


def unpack(archive: Path) -> Path:
    """The folder that CIFAR-10 was unpacked into: where the archive lies or, where that can't be written to, ./data."""
    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise InputError(f"{archive} is damaged (its md5 is not {CIFAR10.tgz_md5}): delete it and fetch it anew")
    try:
        extract_archive(str(archive), str(archive.parent))
        return archive.parent
    except OSError as error:
        print(f"{archive} can't be unpacked where it lies ({error.strerror}): unpacking it into ./data")
        extract_archive(str(archive), "data")
        return Path("data")


def check_cifar10_files(root: Path) -> None:
    """Raises an InputError that names the first missing or damaged file of the extracted data set."""
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for filename, md5 in files:
        path = root / CIFAR10.base_folder / filename
        if not check_integrity(path, md5):
            state = "damaged" if path.is_file() else "missing"
            raise InputError(f"{path} is {state}: delete {path.parent} and extract {CIFAR10.filename} anew")
