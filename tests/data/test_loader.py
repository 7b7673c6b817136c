"""Batches: every image once, in an order that depends on seed and epoch alone and can start midway."""

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import images_with_numbers, make_tree

from ex2.data import load, loader
from ex2.data.images import ImageFiles, ImageSet, reverse_transform
from ex2.data.load import load_splits
from ex2.data.loader import make_loader, read_all
from ex2.errors import exit_code_of


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_resident_loader_yields_every_image_once_with_its_label(batch_size):
    loader = make_loader(images_with_numbers(50), batch_size, "cpu", train=True)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-50 // batch_size)
    labels = torch.cat([labels for _, labels in batches])
    images = reverse_transform(torch.cat([images for images, _ in batches]))
    assert sorted(labels.tolist()) == list(range(50))
    assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        loader = make_loader(images_with_numbers(50), 50, "cpu", train=True, seed=seed)
        loader.set_epoch(epoch)
        return next(iter(loader))[1].tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_flips_half_of_the_training_images_and_no_others():
    dataset = images_with_numbers(200)

    def flipped(**options):
        images = reverse_transform(torch.cat([x for x, _ in make_loader(dataset, 32, "cpu", **options)]))
        return (images[:, 0, 0, 0] == 255).float().mean().item()

    assert 0.4 < flipped(train=True, flip=True) < 0.6
    assert flipped(train=True, flip=False) == 0
    assert flipped(train=False, flip=True) == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_folder_that_does_not_fit_is_read_while_training(tmp_path, monkeypatch, num_workers):
    make_tree(tmp_path, {"a": 30, "b": 20})
    monkeypatch.setattr(load, "RESIDENT_LIMIT", 100)
    splits = load_splits("folder", str(tmp_path), 8, seed=0)
    assert isinstance(splits.train, ImageFiles) and 32 < len(splits.train) <= 48  # three batches
    loader = make_loader(splits.train, 16, "cpu", train=True, flip=True, num_workers=num_workers)
    loader.set_epoch(1)
    batches = list(loader)
    assert sum(len(labels) for _, labels in batches) == len(splits.train) and len(loader) == 3
    assert batches[0][0].shape == (16, 3, 8, 8) and batches[0][0].abs().max() <= 1
    first = [labels.tolist() for _, labels in batches]
    loader.set_epoch(1)
    assert [labels.tolist() for _, labels in loader] == first
    loader.set_epoch(1, batches_done=2)
    rest = list(loader)
    assert len(loader) == 3 and len(rest) == 1 and torch.equal(rest[0][0], batches[2][0])
    loader.set_epoch(1, batches_done=3)
    assert list(loader) == []


@pytest.mark.parametrize("batches_done", [0, 1, 3, 5, 6])
def test_an_epoch_can_start_midway(batches_done):
    images = torch.randint(0, 256, (45, 3, 4, 4), dtype=torch.uint8)
    loader = make_loader(ImageSet(images, torch.arange(45)), 8, "cpu", train=True, flip=True, seed=3)
    loader.set_epoch(2)
    whole = list(loader)
    loader.set_epoch(2, batches_done)
    rest = list(loader)
    assert len(rest) == len(whole) - batches_done
    for (images, labels), (wanted_images, wanted_labels) in zip(rest, whole[batches_done:]):
        assert torch.equal(images, wanted_images) and torch.equal(labels, wanted_labels)


@pytest.mark.parametrize("resident", [True, False])
def test_half_of_the_images_are_mirrored_anew_in_every_epoch(tmp_path, monkeypatch, resident):
    for i in range(200):
        folder = tmp_path / ("a", "b")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    if not resident:
        monkeypatch.setattr(load, "RESIDENT_LIMIT", 100)
    splits = load_splits("folder", str(tmp_path), 8, seed=0)
    loader = make_loader(splits.train, 200, "cpu", train=True, flip=True)
    mirrored = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        images, _ = next(iter(loader))
        plain = torch.stack([splits.train[i][0] for i in loader.plan.order.tolist()])
        changed = (images != plain).flatten(1).any(1)
        assert torch.equal(images[changed], plain[changed].flip(-1))
        assert 0.35 < changed.double().mean() < 0.65
        mirrored.append(set(loader.plan.order[changed].tolist()))
    assert mirrored[0] != mirrored[1]


@pytest.mark.parametrize("flip, expected", [(True, 0.5), (False, 0.0)])
@pytest.mark.parametrize("train", [True, False])
def test_files_are_flipped_in_training_alone(tmp_path, flip, expected, train):
    (tmp_path / "a").mkdir()
    half = Image.new("RGB", (8, 8))
    half.paste((255, 255, 255), (0, 0, 4, 8))
    half.save(tmp_path / "a" / "x.png")
    files = ImageFiles((tmp_path / "a" / "x.png",) * 200, torch.zeros(200), 8)
    torch.manual_seed(0)
    batches = [images for images, _ in make_loader(files, 50, "cpu", train=train, flip=flip)]
    flipped = (torch.cat(batches)[:, 0, 0, 0] < 0).float().mean().item()
    assert flipped == pytest.approx(expected if train else 0, abs=0.1)


class KillingFiles(ImageFiles):
    """Reading its second batch kills the worker, as a system does that is short of memory."""

    def __getitem__(self, index):
        if self.labels[index[0] if isinstance(index, tuple) else index] >= 64:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8), self.labels[0]


class HangingFiles(ImageFiles):
    """Reading takes longer than anybody waits."""

    def __getitem__(self, index):
        time.sleep(2)
        return torch.zeros(3, 8, 8), self.labels[0]


class MissingFiles(ImageFiles):
    """Files that were deleted meanwhile."""


def read_at_once(files, num_workers):
    return read_all([files], num_workers)


def read_in_batches(files, num_workers):
    return list(make_loader(files, 64, "cpu", num_workers=num_workers))


def put_end_of(read, files, said):
    try:
        read(files, 1)
    except Exception as error:
        said.put(exit_code_of(error))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("read", [read_at_once, read_in_batches])
@pytest.mark.parametrize(
    "kind, code, message",
    [
        (KillingFiles, 1, r"DataLoader worker .*: lower --num_workers, or free memory"),
        (HangingFiles, 1, r"^error: reading images failed \(DataLoader timed out after 1 seconds\): lower --num"),
        (MissingFiles, 2, r"^error: gone/0\.png can't be read as an image"),
    ],
)
def test_what_ends_a_dataloader_worker_is_one_line(monkeypatch, kind, code, message, read):
    """In a fork, as torch raises the death of a worker wherever Python happens to be."""
    if kind is HangingFiles:
        monkeypatch.setattr(loader, "WORKER_TIMEOUT", 1)
    files = kind(tuple(Path(f"gone/{number}.png") for number in range(128)), torch.arange(128), 8)
    if kind is HangingFiles:
        files = files.subset(torch.arange(1))
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    process = context.Process(target=put_end_of, args=(read, files, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not said.empty()
    found, line = said.get()
    assert found == code and re.search(message, line) and "\n" not in line


def test_a_worker_that_is_killed_in_the_middle_of_a_step_is_one_line():
    code, line = exit_code_of(RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "))
    assert code == 1 and line.startswith("error: DataLoader worker (pid 3) is killed by signal: Killed.")
    assert line.endswith("lower --num_workers, or free memory and shared memory (/dev/shm)")
