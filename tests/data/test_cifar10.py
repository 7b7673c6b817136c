"""CIFAR-10: where it is looked for, and what is said of missing and damaged files."""

import hashlib
import os
import pickle
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from ex2.data import cifar10
from ex2.data.cifar10 import load_cifar10
from ex2.errors import InputError


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
    train, _, test, names = load_cifar10(str(small_cifar10), image_size)
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
