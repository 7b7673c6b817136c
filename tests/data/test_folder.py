"""Folders of images: which layouts there are, what is left out, and splits that each file's own name decides."""

import os
import sys
import unicodedata

import pytest
import torch
from PIL import Image
from tiny import make_tree

from ex2.data import images as data_images
from ex2.data import load, loader
from ex2.data.images import DataSplits, ImageSet, fingerprint_of
from ex2.data.load import load_splits
from ex2.errors import InputError


def load_tree(root, layout=None, seed=0, size=8) -> DataSplits:
    make_tree(root, layout or {})
    return load_splits("folder", str(root), size, seed)


@pytest.fixture
def as_files(monkeypatch):
    """Folders are not read into memory, so that `paths` can be looked at."""
    monkeypatch.setattr(load, "RESIDENT_LIMIT", 0)


def parts_of(splits) -> dict:
    """{path of a file: its part}"""
    return {path: name for name in ("train", "val", "test") for path in getattr(splits, name).paths}


# ------------------------------------------------------------------ layouts


def test_folder_with_train_and_test(tmp_path):
    splits = load_tree(tmp_path, {"train/cat": 12, "train/dog": 8, "test/cat": 3, "test/dog": 2})
    assert splits.class_names == ("cat", "dog")
    assert len(splits.train) + len(splits.val) == 20 and len(splits.test) == 5
    assert splits.train.images.shape[1:] == (3, 8, 8) and splits.train.images.dtype.itemsize == 1
    assert sorted(splits.test.labels.tolist()) == [0, 0, 0, 1, 1]


def test_val_beside_train_is_the_validation_set(tmp_path, as_files):
    splits = load_tree(tmp_path, {"train/a": 12, "train/b": 12, "val/a": 2, "val/b": 3, "test/a": 4, "test/b": 4})
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [24, 5, 8]
    assert {path.parts[-3] for path in splits.val.paths} == {"val"}
    make_tree(tmp_path, {"val/c": 2})
    with pytest.raises(InputError, match="classes in .*val differ"):
        load_tree(tmp_path)


def test_images_without_classes_are_one_class(tmp_path):
    splits = load_tree(tmp_path / "flat", {".": 40})
    assert splits.class_names == ("images",)
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 40
    splits = load_tree(tmp_path / "parts", {"train": 20, "val": 3, "test": 4})
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [20, 3, 4]


def test_the_first_test_images_stand_for_all_classes(tmp_path):
    splits = load_tree(tmp_path, {"train/a": 12, "train/b": 12, "test/a": 40, "test/b": 40})
    assert 5 < splits.test.labels[:20].sum() < 15


def test_folders_of_another_shape_are_explained(tmp_path):
    with pytest.raises(InputError, match="needs --data_dir"):
        load_splits("folder", None, 8, 0)
    with pytest.raises(InputError, match="nowhere is no folder"):
        load_tree(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no images"):
        load_tree(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="holds test, and no train"):
        load_tree(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_tree(tmp_path)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    with pytest.raises(InputError, match="classes in .*test differ"):
        load_tree(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 2})


def test_classes_named_as_splits_are_classes(tmp_path):
    """datasets' imagefolder puts the pictures of train/test/ into the test split, too."""
    splits = load_tree(tmp_path / "flat", {"train": 20, "car": 20, "train/.ipynb_checkpoints": 2})
    assert splits.class_names == ("car", "train")
    tree = {"train/car": 20, "train/test": 20, "test/car": 3, "test/test": 2}
    splits = load_tree(tmp_path / "split", tree)
    assert splits.class_names == ("car", "test")
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (40, 5)


def test_unicode_forms_of_one_name_are_one_class(tmp_path, as_files):
    """A Mac writes "é" as "e" and an accent: the same class, and the same split."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    splits = load_tree(tmp_path / "a", {f"train/{composed}": 20, f"test/{decomposed}": 3})
    assert splits.class_names == (composed,)
    one, other = (load_tree(tmp_path / form, {form: 40, "b": 40}) for form in (composed, decomposed))
    assert one.class_names == other.class_names == ("b", composed)
    names = [[path.name for path in splits.test.paths] for splits in (one, other)]
    assert names[0] == names[1]


# ------------------------------------------------------------------ what is left out


def test_other_files_are_skipped_and_counted(tmp_path, capsys):
    make_tree(tmp_path, {"a": 12})
    for name in ("notes.txt", "Thumbs.db", "._000.png"):
        (tmp_path / "a" / name).write_text("x")
    splits = load_tree(tmp_path)
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 12
    assert "skipped 3 entries" in capsys.readouterr().out


def test_a_training_set_leaves_nothing_out_without_a_word(tmp_path, capsys):
    make_tree(tmp_path, {"train/cat": 12, "train/dog": 12, "test/cat": 3, "test/dog": 3, "birds": 2})
    (tmp_path / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    splits = load_tree(tmp_path)
    said = capsys.readouterr().out
    assert splits.class_names == ("cat", "dog") and len(splits.train) + len(splits.val) == 24
    assert "left out: birds" in said and "skipped 1 entries that are no images (1 more)" in said
    assert said.count("skipped 1 entries that are in no class folder (1 .png)") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links_to_nothing_are_counted_and_named(tmp_path, capsys):
    make_tree(tmp_path, {"cat": 12, "dog": 12})
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "fish").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "good.png").symlink_to(tmp_path / "cat" / "000.png")
    splits = load_tree(tmp_path)
    said = capsys.readouterr().out
    assert splits.class_names == ("cat", "dog")
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 25
    assert "1 broken links: gone.png" in said and "1 broken links: fish" in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of bytes")
def test_a_class_whose_name_is_no_utf8_is_refused_before_training(tmp_path):
    make_tree(tmp_path, {"cat": 12})
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"'caf\\udce9' is no UTF-8: rename it"):
        load_tree(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    make_tree(tmp_path, {"a": 12})
    (tmp_path / "a" / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png can't be read"):
        load_tree(tmp_path)


# ------------------------------------------------------------------ splits


def test_adding_or_removing_a_file_moves_no_other(tmp_path, as_files):
    """60 changes to a folder of three classes, one of them small."""
    make_tree(tmp_path, {"a": 90, "b": 90, "c": 40})
    before = parts_of(load_tree(tmp_path))
    for number in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / "abc"[number % 3] / f"new{number}.png")
        after = parts_of(load_tree(tmp_path))
        assert {path: after[path] for path in before} == before
        before = after
    for path in sorted(before, key=str)[::7][:30]:
        path.unlink()
        after = parts_of(load_tree(tmp_path))
        assert after == {other: part for other, part in before.items() if other != path}
        before = after


def test_a_split_is_about_a_tenth_of_each_class_and_depends_on_the_seed(tmp_path, as_files):
    make_tree(tmp_path / "data", {"a": 200, "b": 200})
    first, second = (load_tree(tmp_path / "data", seed=seed) for seed in (0, 1))
    for part in (first.test, first.val, second.test):
        assert all(10 <= count <= 32 for count in part.labels.bincount().tolist())
    assert set(first.test.paths) != set(second.test.paths)
    (tmp_path / "data").rename(tmp_path / "elsewhere")  # where the folder lies doesn't matter
    names = [[path.name for path in load_tree(tmp_path / "elsewhere").test.paths], [p.name for p in first.test.paths]]
    assert names[0] == names[1]


def test_every_class_keeps_a_training_image_and_one_without_a_test_image_is_named(tmp_path, as_files, capsys):
    """Thirty classes of one to three images beside a large one, with ten seeds."""
    sizes = {f"c{number:02d}": 1 + number % 3 for number in range(30)}
    make_tree(tmp_path, {**sizes, "large": 40})
    for seed in range(10):
        splits = load_tree(tmp_path, seed=seed)
        counts = [part.labels.bincount(minlength=31).tolist() for part in (splits.train, splits.val, splits.test)]
        assert min(counts[0]) == 1
        assert [bool(count) for count in counts[2]] == [size >= 2 for size in sizes.values()] + [True]
        assert "no test image is left of c00, c03, c06, c09, c12 and 5 more" in capsys.readouterr().out


def test_a_class_without_a_training_image_is_named():
    """Of arrays a permutation decides: 'other' of the butterflies may be a single image."""
    train = ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="no training image is left of rare: give more"):
        load.check_classes(train, train, ("common", "rare"))


def test_too_few_files_to_split_are_named(tmp_path):
    with pytest.raises(InputError, match="1 images are too few"):
        load_tree(tmp_path, {"a": 2})


# ------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize("resident", [True, False])
def test_the_fingerprint_sees_each_file(tmp_path, monkeypatch, resident):
    monkeypatch.setattr(load, "RESIDENT_LIMIT", 2**30 if resident else 0)
    make_tree(tmp_path, {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    before = fingerprint_of(load_tree(tmp_path))
    assert fingerprint_of(load_tree(tmp_path)) == before and before["train"].startswith("12 images ")
    for path in sorted(tmp_path.rglob("*.png")):
        content = path.read_bytes()
        Image.new("RGB", (20, 14), (1, 2, 3)).save(path)
        after = fingerprint_of(load_tree(tmp_path))
        changed = {part for part in before if after[part] != before[part]}
        assert changed == {path.relative_to(tmp_path).parts[0]}
        path.write_bytes(content)
    (tmp_path / "train" / "a" / "000.png").unlink()
    assert fingerprint_of(load_tree(tmp_path))["train"].startswith("11 images ")


def test_the_fingerprint_sees_all_of_a_file(tmp_path):
    """A byte changed at each of 64 places of a small file, or a stretch of a large one."""
    path = tmp_path / "x.png"
    for size, stretch in ((20_000, 1), (1_000_000, 70_000)):
        data = os.urandom(size)
        path.write_bytes(data)
        before = data_images.file_sample(path)
        for place in range(64):
            start = place * (size - stretch) // 63
            flipped = bytes(255 - value for value in data[start : start + stretch])
            path.write_bytes(data[:start] + flipped + data[start + stretch :])
            assert data_images.file_sample(path) != before


def test_reading_a_folder_says_so_in_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ex2.machine.progress.LOG_SECONDS", 0)
    monkeypatch.setattr(loader, "READ_BATCH", 10)
    load_tree(tmp_path, {"train/a": 30, "test/a": 10})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"reading 40 images from {tmp_path}"
    assert lines[1:] == [f"reading images: {part}%" for part in (25, 50, 75, 100)]
