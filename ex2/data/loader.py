"""Loaders: a data set in batches of images in [-1, 1], in an order that can be resumed and shared (2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ex2.data.images import ImageFiles, ImageSet, join, reverse_transform, to_model_range
from ex2.errors import InputError, ReadingError
from ex2.machine.job import ignore_signals, kill_workers
from ex2.machine.processes import shard
from ex2.machine.progress import track

WORKER_TIMEOUT = 300  # seconds a DataLoader worker may take for a batch
READ_BATCH = 64  # images that `read_all` takes at once


def read_batches(files: ImageFiles, num_workers: int, **settings) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a DataLoader, whose errors are one line each, with or without workers.

    Args:
        files: what is read.
        num_workers: DataLoader workers that read it.
        settings: of the DataLoader, as `batch_size` or `batch_sampler`.

    Raises:
        InputError: an image can't be read.
        ReadingError: the memory is full, or a worker was killed or hangs.
    """
    settings["timeout"] = WORKER_TIMEOUT if num_workers else 0
    # A generator of its own: making an iterator draws a number, and must not from the one that training uses.
    settings["generator"] = torch.Generator()
    try:
        yield from DataLoader(files, num_workers=num_workers, worker_init_fn=ignore_signals, **settings)
    except (InputError, RuntimeError) as error:
        kind, line = type(error), str(error).strip().splitlines()[-1]  # a worker's traceback stands before the line
        if kind in (InputError, ReadingError):
            failure = kind(line.replace(f"{kind.__module__}.{kind.__name__}: ", ""))
        elif "DataLoader" in str(error):
            advice = "lower --num_workers, or free memory and shared memory (/dev/shm)"
            failure = ReadingError(f"reading images failed ({line}): {advice}")
        else:
            raise
        if num_workers:
            kill_workers()  # else they wait for the end of this process, and it for theirs
        raise failure from error


def read_all(parts: list[ImageFiles], num_workers: int) -> list[ImageSet]:
    """Every file of the parts, decoded into memory."""
    files = join(*parts)
    print(f"reading {len(files)} images from {files.root}")
    batches = read_batches(files, num_workers, batch_size=READ_BATCH)
    batches = track(batches, "reading images", -(-len(files) // READ_BATCH))
    images = torch.cat([reverse_transform(images) for images, _ in batches])
    sizes = [len(part) for part in parts]
    return [ImageSet(*pair) for pair in zip(images.split(sizes), files.labels.split(sizes))]


class EpochPlan:
    """Order, flips and batches of an epoch: they depend on the seed and on the epoch alone, and can start midway.

    As a batch sampler it yields lists of (index, whether that image is mirrored).

    Args:
        count: images of the data set.
        batch_size: images of a batch, over all processes.
        shuffle: whether each epoch has an order of its own.
        flip: whether half of the images are mirrored, others in each epoch.
        seed: of order and flips.
        part: (this process, number of processes); each has its own rows of every batch, or one row of it (whose loss
            won't count) where there are fewer images than processes.
    """

    def __init__(self, count: int, batch_size: int, *, shuffle=False, flip=False, seed=0, part=(0, 1)):
        self.count, self.batch_size, self.part = count, batch_size, part
        self.shuffle, self.flip, self.seed = shuffle, flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """Plans an epoch of which `batches_done` batches were trained on before the run was cut off."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        self.mirrored = ((torch.rand(self.count, generator=generator) < 0.5) & self.flip)[self.order]
        self.batches_done = batches_done

    @property
    def batches(self) -> int:
        """How many a whole epoch has."""
        return math.ceil(self.count / self.batch_size)

    def images_in(self, batch: int) -> int:
        """How many images batch number `batch` has, over all processes; the last one may be smaller."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def __len__(self) -> int:
        return max(0, self.batches - self.batches_done)

    def own_rows(self, batch: int) -> tuple[slice, float]:
        """(this process's rows of batch number `batch`, weight of their mean loss).

        With these weights the mean over processes is the mean over the batch; a row that stands in for none has 0.
        """
        total, parts = self.images_in(batch), self.part[1]
        mine = shard(total, self.part)
        return slice(mine.start, mine.stop) if mine else slice(0, 1), len(mine) * parts / total

    def rows(self) -> Iterator[slice]:
        """Where this process's images stand in `order`, batch by batch."""
        for batch in range(self.batches_done, self.batches):
            start, (own, _) = batch * self.batch_size, self.own_rows(batch)
            yield slice(start + own.start, start + own.stop)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for rows in self.rows():
            yield list(zip(self.order[rows].tolist(), self.mirrored[rows].tolist()))


class Loader:
    """An iterable over (images (B, 3, H, W) in [-1, 1], labels (B,)), as its `EpochPlan` says.

    An `ImageSet` lies on the device, where shuffling, flips and scaling cost no Python per image. `ImageFiles` are read
    by a DataLoader, on the CPU.
    """

    def __init__(self, dataset: ImageSet | ImageFiles, plan: EpochPlan, device, num_workers: int):
        on_device = isinstance(dataset, ImageSet)
        self.dataset = ImageSet(dataset.images.to(device), dataset.labels.to(device)) if on_device else dataset
        self.plan, self.num_workers = plan, num_workers

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration is that of an epoch, without its first `batches_done` batches."""
        self.plan.set_epoch(epoch, batches_done)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset, ImageFiles):
            yield from read_batches(self.dataset, self.num_workers, batch_sampler=self.plan)
            return
        order, mirrored = (numbers.to(self.dataset.labels.device) for numbers in (self.plan.order, self.plan.mirrored))
        for rows in self.plan.rows():
            images = self.dataset.images[order[rows]]
            if self.plan.flip:
                images = torch.where(mirrored[rows][:, None, None, None], images.flip(-1), images)
            yield to_model_range(images), self.dataset.labels[order[rows]]


def make_loader(
    dataset, batch_size: int, device, *, train=False, flip=False, seed=0, num_workers=0, part=(0, 1)
) -> Loader:
    """The loader of a data set.

    Args:
        dataset: an `ImageSet` or `ImageFiles`.
        device: where an `ImageSet` is kept.
        train: shuffle the images, and mirror half of them where `flip` says so.
        num_workers: DataLoader workers that read image files.
        batch_size, seed, part: as in `EpochPlan`.
    """
    plan = EpochPlan(len(dataset), batch_size, shuffle=train, flip=train and flip, seed=seed, part=part)
    return Loader(dataset, plan, device, num_workers)
