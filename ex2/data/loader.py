"""Loaders: a data set in batches of images in [-1, 1], in an order that can be resumed and shared (2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ex2.data.images import ImageFiles, ImageSet, to_model_range
from ex2.machine.job import ignore_signals
from ex2.machine.processes import shard


class EpochPlan:
    """Order, flips and batches of an epoch: they depend on the seed and on the epoch alone, and can start midway.

    As a batch sampler it yields lists of (index, whether that image is mirrored).

    Args:
        batch_size: images of a batch, over all processes.
        part: (this process, number of processes); each has its own rows of every batch, or one row of it (whose loss
            won't count) where there are fewer images than processes.
    """

    def __init__(self, count: int, batch_size: int, *, shuffle=False, flip=False, seed=0, part=(0, 1)):
        self.count, self.batch_size, self.part = count, batch_size, part
        self.shuffle, self.flip, self.seed = shuffle, flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """Plans an epoch from `batches_done` on; earlier batches were seen before the run was cut off."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        mirrored = (torch.rand(self.count, generator=generator) < 0.5) & self.flip
        self.mirrored = mirrored[self.order]
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
    """Batches from an `ImageSet` on the device: shuffling, flips and scaling cost no Python per image.

    An iterable over (images (B, 3, H, W) in [-1, 1], labels (B,)), as its `EpochPlan` says.
    """

    def __init__(self, dataset: ImageSet, plan: EpochPlan, device):
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.plan, self.device = plan, torch.device(device)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration is that of an epoch, from batch number `batches_done` on."""
        self.plan.set_epoch(epoch, batches_done)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, mirrored = self.plan.order.to(self.device), self.plan.mirrored.to(self.device)
        for rows in self.plan.rows():
            images = self.images[order[rows]]
            if self.plan.flip:
                images = torch.where(mirrored[rows][:, None, None, None], images.flip(-1), images)
            yield to_model_range(images), self.labels[order[rows]]


class FilesLoader(Loader):
    """Batches from `ImageFiles`, read by a DataLoader, on the CPU."""

    def __init__(self, dataset: ImageFiles, plan: EpochPlan, num_workers: int = 0):
        self.plan = plan
        # A generator of its own: making an iterator draws a number, and must not from the one that training uses.
        workers = {"num_workers": num_workers, "worker_init_fn": ignore_signals}
        self.loader = DataLoader(dataset, batch_sampler=plan, generator=torch.Generator(), **workers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def make_loader(
    dataset, batch_size: int, device, *, train=False, flip=False, seed=0, num_workers=0, part=(0, 1)
) -> Loader:
    """The loader for a kind of data set.

    Args:
        dataset: an `ImageSet` or `ImageFiles`.
        batch_size: images of a batch, over all processes.
        device: where an `ImageSet` is kept.
        train: shuffle the images, and mirror half of them where `flip` says so.
        seed: of order and flips.
        num_workers: DataLoader workers that read image files.
        part: (this process, number of processes), as in `EpochPlan`.
    """
    plan = EpochPlan(len(dataset), batch_size, shuffle=train, flip=train and flip, seed=seed, part=part)
    return Loader(dataset, plan, device) if isinstance(dataset, ImageSet) else FilesLoader(dataset, plan, num_workers)
