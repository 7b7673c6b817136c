"""Pixels, the split of an array, and whatever people's image files are like."""

import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import images_with_numbers

from ex2.data import decode
from ex2.data.decode import read_image
from ex2.data.images import ImageFiles, ImageSet, digest_images, reverse_transform, split_off, to_model_range
from ex2.errors import InputError, RunError

# ------------------------------------------------------------------ pixels and splits of arrays


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(reverse_transform(to_model_range(pixels)), pixels)
    assert to_model_range(pixels).min() == -1 and to_model_range(pixels).max() == 1


def test_reverse_transform_values():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 1.3])
    assert reverse_transform(x).tolist() == [0, 0, 128, 255, 255]


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


def test_digests_see_every_pixel_and_labels_256_apart():
    images, labels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([3])
    seen = set(digest_images(ImageSet(images, labels)) + digest_images(ImageSet(images, labels + 256)))
    for pixel in range(images.numel()):
        changed = images.clone()
        changed.view(-1)[pixel] = 1
        seen.update(digest_images(ImageSet(changed, labels)))
    assert len(seen) == 2 + images.numel()


# ------------------------------------------------------------------ image files of every kind


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


@pytest.mark.parametrize("square", ["crop", "pad"])
@pytest.mark.parametrize("size", [(60_000, 3), (3, 60_000)])
def test_a_thin_picture_is_cropped_before_it_is_resized(tmp_path, monkeypatch, size, square):
    Image.new("RGB", size, (200, 10, 20)).save(tmp_path / "x.png")
    made, resize = [], Image.Image.resize

    def spy(image, *args, **kwargs):
        made.append(resize(image, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert read_image(tmp_path / "x.png", 64, square)[:, 32, 32].tolist() == [200, 10, 20]
    assert made and all(max(image.size) <= 64 for image in made)


def test_too_many_pixels_are_refused_by_size_in_one_line(tmp_path):
    for size in ((12_000, 12_000), (13_500, 13_500)):  # Pillow warns of the first and refuses the second
        Image.new("1", size).save(tmp_path / "x.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError) as error:
                read_image(tmp_path / "x.png", 8)
        message = str(error.value)
        assert f"x.png is too large (Image size ({size[0] * size[1]} pixels) exceeds limit of " in message
        assert "\n" not in message and message.endswith("make it smaller")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_full_memory_while_reading_is_called_memory(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(decode, "prepare_image", fail)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(RunError, match=r"the memory is full, .*x\.png can't be read: free some"):
        read_image(tmp_path / "x.png", 8)


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


def test_an_exif_that_cannot_be_written_back_turns_the_image_all_the_same(photograph, monkeypatch):
    """As with a YResolution of -1/0, for which some versions of Pillow raise struct.error."""
    upright = read_image(photograph, 8, "pad")
    assert upright[0, 1].float().mean() > 120 and upright[2, 1, 4] < 80 and upright[0, -2, 4] < 80  # red above blue

    def fail(*args):
        raise struct.error("argument out of range")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert torch.equal(read_image(photograph, 8, "pad"), upright)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".mpo"])
def test_every_orientation_is_upright(tmp_path, suffix):
    pixels = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).resize((40, 24))
    for orientation in range(9):
        exif, path = Image.Exif(), tmp_path / f"x{suffix}"
        exif[0x0112] = orientation
        more = {"save_all": True, "append_images": [pixels]} if suffix == ".mpo" else {}
        pixels.save(path, exif=exif, **more)
        with Image.open(path) as image:
            expected = ImageOps.pad(ImageOps.exif_transpose(image).convert("RGB"), (8, 8), color="white")
        difference = read_image(path, 8, "pad").float() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
        assert difference.abs().max() <= 2


def test_no_damage_to_the_metadata_decides_over_the_pixels(photograph, tmp_path):
    """Every byte of the EXIF block set to 0, 255 and its complement: an image each time, upright or as it lies."""
    data, path = photograph.read_bytes(), tmp_path / "x.jpg"
    start = data.index(b"Exif")
    end = start + int.from_bytes(data[start - 2 : start], "big") - 2
    variants = [(at, value) for at in range(start, end) for value in {0, 255, 255 - data[at]}]
    assert len(variants) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is there a line for each image
        for at, value in variants:
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            assert read_image(path, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"])
def test_a_damaged_image_is_an_image_or_named(tmp_path, suffix):
    """Cut off at every seventh place, and with every eleventh byte changed."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    path = tmp_path / f"x{suffix}"
    image.save(path)
    data = path.read_bytes()
    variants = [data[:n] for n in range(0, len(data), 7)]
    variants += [data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :] for n in range(0, len(data), 11)]
    for content in variants:
        path.write_bytes(content)
        try:
            assert read_image(path, 8).shape == (3, 8, 8)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error).strip()


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "PA")


def grey_of_127(mode: str, suffix: str) -> Image.Image:
    """In 16 bits 127 * 257."""
    if mode in ("I", "F", "I;16"):
        value = 127 * 257 if mode == "I;16" or (mode == "I" and suffix in (".png", ".ppm")) else 127
        return Image.fromarray(np.full((8, 8), value, {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    grey = Image.fromarray(np.full((8, 8, 3), 127, np.uint8))
    return grey.convert("LA").convert("PA") if mode == "PA" else grey.convert(mode)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".jpg", ".gif", ".bmp", ".webp"])
def test_every_mode_of_every_format_is_scaled_by_its_range_or_refused(tmp_path, suffix):
    """Grey of 127 is read as 127 (or as what the format itself kept), or refused; never black."""
    path, tried = tmp_path / f"x{suffix}", 0
    for mode in MODES:
        try:
            grey_of_127(mode, suffix).save(path)
            with Image.open(path) as image:
                image.load()
        except (OSError, ValueError, KeyError):
            continue  # Pillow doesn't write this mode in this format, or can't read what it wrote
        tried += 1
        try:
            image = read_image(path, 8)
        except InputError as error:
            assert "32 bits of unknown range" in str(error) and mode in ("I", "F")
            continue
        with Image.open(path) as kept:
            eight_bits = kept.mode not in ("I", "F") and not kept.mode.startswith("I;16")
            expected = np.asarray(kept.convert("RGB")).mean() if eight_bits else 127
        assert image.shape == (3, 8, 8) and image.float().mean().item() == pytest.approx(expected, abs=3)
    assert tried >= 4
