"""Pixels, splits, loaders and the three data sets."""

import hashlib
import os
import pickle
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import images_with_numbers, make_tree
from torchvision.datasets import CIFAR10

from ex2.data import cifar10
from ex2.data.cifar10 import load_cifar10
from ex2.data.folder import load_folder
from ex2.data.images import ImageFiles, read_image, reverse_transform, split_off, to_model_range
from ex2.data.load import load_splits
from ex2.errors import InputError

# ------------------------------------------------------------------ pixels


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(reverse_transform(to_model_range(pixels)), pixels)
    assert to_model_range(pixels).min() == -1 and to_model_range(pixels).max() == 1


def test_reverse_transform_values():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 1.3])
    assert reverse_transform(x).tolist() == [0, 0, 128, 255, 255]


# ------------------------------------------------------------------ splits


def test_split_is_90_to_10_disjoint_complete_and_seeded():
    dataset = images_with_numbers(200)
    train, val = split_off(dataset, seed=3)
    assert (len(train), len(val)) == (180, 20)
    assert sorted(torch.cat((train.labels, val.labels)).tolist()) == list(range(200))
    assert torch.equal(val.labels, split_off(dataset, seed=3)[1].labels)
    assert not torch.equal(val.labels, split_off(dataset, seed=4)[1].labels)


def test_too_few_images_to_split_are_named():
    with pytest.raises(InputError, match="3 images are too few"):
        split_off(images_with_numbers(3), seed=0)


def test_data_sets_survive_pickling():
    """Worker processes of Windows and macOS get their data set that way."""
    for dataset in (images_with_numbers(3), ImageFiles((), torch.empty(0), 8)):
        assert len(pickle.loads(pickle.dumps(dataset))) == len(dataset)


# ------------------------------------------------------------------ folder


def test_folder_with_train_and_test(tmp_path):
    make_tree(tmp_path, {"train/cat": 12, "train/dog": 8, "test/cat": 3, "test/dog": 2})
    splits = load_splits("folder", str(tmp_path), 8, seed=0)
    assert splits.class_names == ("cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 5)
    assert splits.train.images.shape == (18, 3, 8, 8) and splits.train.images.dtype == torch.uint8
    assert sorted(splits.test.labels.tolist()) == [0, 0, 0, 1, 1]


def test_folder_of_classes_alone_holds_out_a_test_set(tmp_path):
    make_tree(tmp_path, {"a": 30, "b": 20})
    train, test, names = load_folder(str(tmp_path), 8, 0, 0)
    assert (len(train), len(test), names) == (45, 5, ("a", "b"))


def test_the_first_test_images_stand_for_all_classes(tmp_path):
    make_tree(tmp_path, {"train/a": 12, "train/b": 12, "test/a": 40, "test/b": 40})
    _, test, _ = load_folder(str(tmp_path), 8, 0, 0)
    assert 5 < test.labels[:20].sum() < 15


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", 8).float()
    np.testing.assert_allclose(image[0], ramp / 257, atol=1)


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match="32 bits of unknown range"):
        read_image(tmp_path / "x.tiff", 8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (10, 10), (255, 255, 255)).convert(mode if mode != "LA" else "L").convert(mode).save(path)
    image = read_image(path, 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert image.min() >= 250


def test_transparency_is_put_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 8) == 255).all()


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (8, 8), (3, 5)])
def test_images_are_resized_and_centre_cropped(tmp_path, size):
    image = Image.new("RGB", size, (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, size[0] // 5, size[1] // 5))  # a corner that a centre crop of 2:1 images loses
    image.save(tmp_path / "x.png")
    out = read_image(tmp_path / "x.png", 8)
    assert out.shape == (3, 8, 8)
    if max(size) >= 2 * min(size):
        assert out[0].max() < 60


def test_other_files_are_skipped_and_counted(tmp_path, capsys):
    make_tree(tmp_path, {"a": 12})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "Thumbs.db").write_text("x")
    (tmp_path / "a" / "._000.png").write_text("macOS")
    train, test, _ = load_folder(str(tmp_path), 8, 0, 0)
    assert len(train) + len(test) == 12
    assert "skipped 3 entries" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    make_tree(tmp_path, {"a": 12})
    (tmp_path / "a" / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png can't be read"):
        load_folder(str(tmp_path), 8, 0, 0)


def test_folders_of_another_shape_are_explained(tmp_path):
    with pytest.raises(InputError, match="needs --data_dir"):
        load_folder(None, 8, 0, 0)
    with pytest.raises(InputError, match="nowhere is no folder"):
        load_folder(str(tmp_path / "nowhere"), 8, 0, 0)
    with pytest.raises(InputError, match="no class folders"):
        load_folder(str(tmp_path), 8, 0, 0)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_folder(str(tmp_path), 8, 0, 0)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    make_tree(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 2})
    with pytest.raises(InputError, match="classes in .*test differ"):
        load_folder(str(tmp_path), 8, 0, 0)


# ------------------------------------------------------------------ cifar10


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """A data set of 20 + 4 images in the format of the python archive, whose md5s torchvision is made to expect."""
    folder = tmp_path / "full" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(count):
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch(4)) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(4))])
    name, md5 = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path / "full"


@pytest.mark.parametrize("image_size", [32, 16])
def test_cifar10_that_is_there_needs_no_network(small_cifar10, no_network, image_size):
    train, test, names = load_cifar10(str(small_cifar10), image_size)
    assert train.images.shape == (20, 3, image_size, image_size) and train.images.dtype == torch.uint8
    assert (len(test), len(names)) == (4, 10)
    with open(small_cifar10 / CIFAR10.base_folder / "data_batch_1", "rb") as file:
        pixels = pickle.load(file)["data"]
    if image_size == 32:
        assert torch.equal(train.images[:4].reshape(4, -1), torch.from_numpy(pixels))


def test_cifar10_is_looked_for_in_order(small_cifar10, no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "COURSE_CIFAR10", small_cifar10)
    assert cifar10.find_cifar10(str(tmp_path / "empty")) == small_cifar10
    monkeypatch.setattr(cifar10, "COURSE_CIFAR10", tmp_path / "absent")
    monkeypatch.setenv("CIFAR10_ROOT", str(small_cifar10))
    assert cifar10.find_cifar10(None) == small_cifar10
    monkeypatch.delenv("CIFAR10_ROOT")
    os.symlink(small_cifar10, tmp_path / "data")
    assert str(cifar10.find_cifar10(None)) == "data"


def test_cifar10_archive_is_extracted_offline(small_cifar10, no_network, monkeypatch, tmp_path):
    place = tmp_path / "archive"
    place.mkdir()
    with tarfile.open(place / CIFAR10.filename, "w:gz") as archive:
        archive.add(small_cifar10 / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((place / CIFAR10.filename).read_bytes()).hexdigest())
    assert len(load_cifar10(str(place), 32)[0]) == 20


def test_missing_cifar10_says_where_it_looked_and_what_to_do(no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_cifar10(str(tmp_path / "mine"), 32)
    message = str(error.value)
    for part in (
        str(tmp_path / "mine" / "cifar-10-batches-py"),
        "/proj/aimi-adl/CIFAR10",
        "--dataset shapes",
        "no network",
    ):
        assert part in message
    assert "\n" not in message


def test_damaged_archive_is_named(no_network, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"half an archive")
    with pytest.raises(InputError, match=f"{CIFAR10.filename} is damaged.*c58f30108f718f92721af3b95e74349a"):
        load_cifar10(str(tmp_path), 32)


@pytest.mark.parametrize(
    "damage, state", [(lambda p: p.write_bytes(b"x"), "damaged"), (lambda p: p.unlink(), "missing")]
)
def test_damaged_batch_file_is_named(small_cifar10, no_network, damage, state):
    damage(small_cifar10 / CIFAR10.base_folder / "data_batch_3")
    with pytest.raises(InputError, match=f"data_batch_3 is {state}"):
        load_cifar10(str(small_cifar10), 32)


# ------------------------------------------------------------------ what people's files are like


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A JPEG of 16x8 pixels, left half red, whose EXIF says that it is to be turned by 90 degrees."""
    path = tmp_path_factory.mktemp("photograph") / "x.jpg"
    image = Image.new("RGB", (16, 8), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112], exif[0x011B] = 6, (72, 1)
    image.save(path, exif=exif, quality=95)
    return path


def test_an_exif_that_cannot_be_written_back_turns_the_image_all_the_same(photograph, tmp_path):
    """YResolution -1/0, for which Pillow raises struct.error when it turns an image."""
    data = photograph.read_bytes()
    order = ">" if struct.pack(">II", 72, 1) in data else "<"
    at = data.index(struct.pack(order + "II", 72, 1))
    (tmp_path / "x.jpg").write_bytes(data[:at] + struct.pack(order + "iI", -1, 0) + data[at + 8 :])
    image = read_image(tmp_path / "x.jpg", 8, "pad")
    assert torch.equal(image, read_image(photograph, 8, "pad"))
    assert image[0, 1].float().mean() > 120 and image[2, 1, 4] < 80 and image[0, -2, 4] < 80  # red above blue


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_every_orientation_in_every_format_is_upright(tmp_path, suffix, orientation):
    exif, path = Image.Exif(), tmp_path / f"x{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).resize((40, 24)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.pad(ImageOps.exif_transpose(image).convert("RGB"), (8, 8), color="white")
    difference = read_image(path, 8, "pad").float() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
    assert difference.abs().max() <= 2


def test_no_damage_to_the_metadata_decides_over_the_pixels(photograph, tmp_path):
    """Every byte of the EXIF block set to 0, 255 and its complement: an image each time, upright or as it lies."""
    data, path = photograph.read_bytes(), tmp_path / "x.jpg"
    start = data.index(b"Exif")
    end = start + int.from_bytes(data[start - 2 : start], "big") - 2
    try_part = 0
    for position in range(start, end):
        for value in {0, 255, 255 - data[position]}:
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_image(path, 8).shape == (3, 8, 8)
            try_part += 1
    assert try_part > 100


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"])
def test_a_damaged_image_is_an_image_or_named(tmp_path, suffix):
    """Cut off at every place, and with every seventh byte changed."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    path = tmp_path / f"x{suffix}"
    image.save(path)
    data = path.read_bytes()
    variants = [data[:n] for n in range(0, len(data), 3)]
    variants += [data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :] for n in range(0, len(data), 7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in variants:
            path.write_bytes(content)
            try:
                assert read_image(path, 8).shape == (3, 8, 8)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error).strip()


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "PA")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".jpg", ".gif", ".bmp", ".webp"])
def test_every_mode_of_every_format_is_scaled_by_its_range_or_refused(tmp_path, mode, suffix):
    """Grey of 127, in 16 bits 127 * 257: read as 127 (or as what the format itself kept), or refused; never black."""
    value = 127 * 257 if mode == "I;16" or (mode == "I" and suffix in (".png", ".ppm")) else 127
    pixels = np.full((8, 8), value, {"I": np.int32, "F": np.float32, "I;16": np.uint16}.get(mode, np.uint8))
    image = Image.fromarray(pixels) if mode in ("I", "F", "I;16") else None
    try:
        if image is None:
            grey = Image.fromarray(np.full((8, 8, 3), 127, np.uint8))
            image = grey.convert("LA").convert("PA") if mode == "PA" else grey.convert(mode)
        image.save(tmp_path / f"x{suffix}")
    except (OSError, ValueError, KeyError):
        pytest.skip(f"Pillow doesn't write {mode} as {suffix}")
    try:
        mean = read_image(tmp_path / f"x{suffix}", 8).float().mean().item()
    except InputError as error:
        assert "range" in str(error)
    else:
        with Image.open(tmp_path / f"x{suffix}") as kept:
            eight_bits = kept.mode not in ("I", "F") and not kept.mode.startswith("I;16")
            expected = np.asarray(kept.convert("RGB")).mean() if eight_bits else 127
        assert mean == pytest.approx(expected, abs=3)


def test_a_32_bit_tiff_of_small_values_is_refused_and_not_black(tmp_path):
    Image.fromarray(np.full((8, 8), 127, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif .*mode I, 32 bits of unknown range"):
        read_image(tmp_path / "x.tif", 8)


def test_a_class_named_train_is_a_class(tmp_path):
    make_tree(tmp_path, {"train": 20, "car": 20, "train/.ipynb_checkpoints": 2})
    _, _, names = load_folder(str(tmp_path), 8, 0, 0)
    assert names == ("car", "train")


def test_a_training_set_leaves_nothing_out_without_a_word(tmp_path, capsys):
    make_tree(tmp_path, {"train/cat": 12, "train/dog": 12, "test/cat": 3, "test/dog": 3, "birds": 2})
    (tmp_path / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    train, _, names = load_folder(str(tmp_path), 8, 0, 0)
    said = capsys.readouterr().out
    assert names == ("cat", "dog") and len(train) == 24
    assert "left out: birds" in said and "skipped 1 entries that are no images (1 more)" in said
    assert "skipped 1 entries that are in no class folder (1 .png)" in said


def test_images_without_classes_are_refused(tmp_path):
    make_tree(tmp_path, {"train": 20, "test": 20})
    with pytest.raises(InputError, match="holds no class folders"):
        load_folder(str(tmp_path), 8, 0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links_to_nothing_are_counted_and_named(tmp_path, capsys):
    make_tree(tmp_path, {"cat": 12, "dog": 12})
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "fish").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "good.png").symlink_to(tmp_path / "cat" / "000.png")
    train, test, names = load_folder(str(tmp_path), 8, 0, 0)
    said = capsys.readouterr().out
    assert names == ("cat", "dog") and len(train) + len(test) == 25
    assert "1 broken links: gone.png" in said and "1 broken links: fish" in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of bytes")
def test_a_class_whose_name_is_no_utf8_is_refused_before_training(tmp_path):
    make_tree(tmp_path, {"cat": 12})
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"'caf\\udce9' is no UTF-8: rename it"):
        load_folder(str(tmp_path), 8, 0, 0)


def fake_batches(folder):
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"x")


def test_the_folder_of_the_batches_itself_can_be_given(tmp_path, monkeypatch):
    fake_batches(tmp_path / "cifar-10-batches-py")
    monkeypatch.setattr(cifar10, "check_cifar10_files", lambda root: None)
    assert cifar10.find_cifar10(str(tmp_path / "cifar-10-batches-py")) == tmp_path
    fake_batches(tmp_path / "renamed")
    with pytest.raises(InputError, match="name it cifar-10-batches-py, give its parent"):
        cifar10.find_cifar10(str(tmp_path / "renamed"))


def test_an_archive_in_a_read_only_folder_is_unpacked_elsewhere(tmp_path, monkeypatch, capsys):
    archive = tmp_path / "shared" / cifar10.CIFAR10.filename
    archive.parent.mkdir()
    archive.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "check_integrity", lambda *args: True)
    unpacked = []

    def extract(source, target):
        if target != "data":
            raise PermissionError(13, "Permission denied")
        unpacked.append((source, target))

    monkeypatch.setattr(cifar10, "extract_archive", extract)
    assert cifar10.find_cifar10(str(archive.parent)) == Path("data")
    assert unpacked == [(str(archive), "data")]
    assert "can't be unpacked where it lies (Permission denied): unpacking it into ./data" in capsys.readouterr().out
