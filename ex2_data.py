"""Data sets as uint8 tensors, or as files that are read when asked for (2.1, 2.5)."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import inspect
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

from ex2_shapes import SHAPES, draw_shapes

DATASETS = ("cifar10", "shapes", "folder", "butterflies")
SQUARES = ("crop", "pad")  # what makes an image square: its centre, or white bars
BUTTERFLIES = "huggan/smithsonian_butterflies_subset"
RARE = 10  # fewer butterflies of a kind are no class of their own
EXIF_ORIENTATION = 0x0112
EXIF_TURNS = dict(  # what undoes an orientation of 2, 3, ...
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2)
)
COURSE_CIFAR10 = Path("/proj/aimi-adl/CIFAR10/")
SHAPES_COUNT = {"train": 10_000, "test": 2_000}  # of which the usual 10% of train become val
SHAPES_SEED = 0
HELD_OUT = 0.1  # share of the training images that become the validation set
RESIDENT_LIMIT = 2 * 1024**3  # bytes of images that are kept on the device; larger folders are read while training
# Everything that a scheduler, a terminal or a limit sends to end a program; what denotes a fault of it is left alone.
ENDINGS = "TERM INT HUP QUIT USR1 USR2 XCPU ALRM VTALRM PWR BREAK"
SIGNALS = [getattr(signal, f"SIG{name}") for name in ENDINGS.split() if hasattr(signal, f"SIG{name}")]


class InputError(ValueError):
    """What the user gave can't be used; the message is one line that says what, where and what to do."""


# ---------------------------------------------------------------------------- pixels


def to_model_range(images: Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def reverse_transform(images: Tensor) -> Tensor:
    """Model outputs to uint8 pixels: -1 -> 0, 0 -> 128, 1 -> 255, rounded, values outside clamped. Any shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------- sets


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


# ---------------------------------------------------------------------------- cifar10


def load_cifar10(data_dir: str | None, image_size: int) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """CIFAR-10 from `data_dir`, $CIFAR10_ROOT, the course's folder or ./data; downloaded where none has it."""
    root = find_cifar10(data_dir)
    print(f"CIFAR-10 from {root}")
    sets = []
    for train in (True, False):
        data = CIFAR10(root, train=train, download=False)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        if image_size != 32:
            images = torch.cat([TF.resize(part, [image_size] * 2, antialias=True) for part in images.split(5000)])
        sets.append(ImageSet(images, torch.tensor(data.targets)))
    return sets[0], sets[1], tuple(data.classes)


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


# ---------------------------------------------------------------------------- folder


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
    say_skipped(folder, [entry for entry in entries if not entry.is_dir()], "are in no class folder")
    return tuple(names)


def say_skipped(folder: Path, entries: list[Path], why: str) -> None:
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
    say_skipped(folder, skipped, "are no images")
    return ImageFiles(tuple(paths), torch.tensor(labels), image_size, square)


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


def leave_signals_to_main(worker: int) -> None:
    """In a process that reads images: a signal to the whole group must not end it while its batch is read."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_readers() -> None:
    """Kills processes that still read when the program ends. Python would send SIGTERM, which they ignore."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a fault
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def read_all(files: ImageFiles, num_workers: int) -> ImageSet:
    """Every file, decoded into memory."""
    loader = DataLoader(files, batch_size=64, num_workers=num_workers, worker_init_fn=leave_signals_to_main)
    batches = [reverse_transform(images) for images, _ in tqdm(loader, "reading images", leave=False, disable=None)]
    return ImageSet(torch.cat(batches), files.labels)


# ---------------------------------------------------------------------------- butterflies


def load_butterflies(data_dir, image_size: int, seed: int, square: str, cache_dir, label_column):
    """2.5: the Smithsonian butterflies through the `datasets` library; a seeded tenth of them is the test set.

    Args:
        data_dir: a parquet file, or a folder of parquet files or of images, in place of the download.
        cache_dir: where the library keeps the download and the resized images.
        label_column: the column that becomes the class; rare values become one class, "other". None: one class for all.

    Raises InputError: the library, the network or the column is missing.
    """
    rows = open_butterflies(data_dir, cache_dir)
    if "image" not in rows.column_names:
        raise InputError(f"the butterflies have no column 'image', only {', '.join(rows.column_names)}")
    labels, class_names = column_labels(rows, label_column)
    # The library recognises work that is done by what it is given; of functions it sees the name, so give the code.
    code = hashlib.sha256((inspect.getsource(prepare_image) + inspect.getsource(upright)).encode()).hexdigest()
    settings = {"image_size": image_size, "square": square, "code": code}
    try:
        rows = rows.select_columns("image").map(prepare_row, fn_kwargs=settings, desc="resizing", with_indices=True)
    except Exception as error:  # as in `read_image`
        raise InputError(f"the butterflies hold an image that can't be read ({error})") from error
    images = torch.stack([TF.pil_to_tensor(row["image"]) for row in rows])
    train, test = split_off(ImageSet(images, labels), seed + 1)
    return train, test, class_names


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
        folder = Path(data_dir)
        if folder.is_dir() and not list(folder.rglob("*.parquet")):
            return datasets.load_dataset("imagefolder", data_dir=data_dir, cache_dir=cache_dir, split="all")
        files = sorted(map(str, folder.rglob("*.parquet"))) if folder.is_dir() else data_dir
        return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, split="train")
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


def prepare_row(row: dict, index: int, image_size: int, square: str, code: str) -> dict:
    """The row with its image prepared by `prepare_image`; `code` is its source."""
    try:
        return {"image": prepare_image(row["image"], image_size, square)}
    except Exception as error:
        raise ValueError(f"row {index}: {error}") from error


# ---------------------------------------------------------------------------- shapes


def load_shapes(image_size: int) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """The embedded data set: ten classes of coloured shapes, the same ones in every run; no file, no network."""
    sets = []
    for offset, count in enumerate(SHAPES_COUNT.values()):
        rng = np.random.default_rng((SHAPES_SEED, offset))
        labels = rng.permutation(np.arange(count) % len(SHAPES))
        sets.append(ImageSet(draw_shapes(labels, image_size, rng), torch.from_numpy(labels).long()))
    return sets[0], sets[1], SHAPES
