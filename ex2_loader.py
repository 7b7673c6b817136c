"""Loaders: a data set in batches of images in [-1, 1], in an order that can be resumed and shared (2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ex2_data import ImageFiles, ImageSet, to_model_range
from ex2_distributed import share_of


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

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Plans an epoch; `first_batch` leaves out those at its start, which a run that was cut off has seen."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        mirrored = (torch.rand(self.count, generator=generator) < 0.5) & self.flip
        self.mirrored = mirrored[self.order]
        self.first_batch = first_batch

    @property
    def batches(self) -> int:
        """How many a whole epoch has."""
        return math.ceil(self.count / self.batch_size)

    def images_in(self, batch: int) -> int:
        """How many images batch number `batch` has, over all processes; the last one may be smaller."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def __len__(self) -> int:
        return max(0, self.batches - self.first_batch)

    def own_rows(self, batch: int) -> tuple[slice, float]:
        """(this process's rows of batch number `batch`, weight of their mean loss).

        With these weights the mean over processes is the mean over the batch; a row that stands in for none has 0.
        """
        total, parts = self.images_in(batch), self.part[1]
        mine = share_of(total, self.part)
        return slice(mine.start, mine.stop) if mine else slice(0, 1), len(mine) * parts / total

    def rows(self) -> Iterator[slice]:
        """The places in `order` of this process's images, batch by batch."""
        for batch in range(self.first_batch, self.batches):
            start, (own, _) = batch * self.batch_size, self.own_rows(batch)
            yield slice(start + own.start, start + own.stop)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for rows in self.rows():
            yield list(zip(self.order[rows].tolist(), self.mirrored[rows].tolist()))


class ResidentLoader:
    """Batches from an `ImageSet` that lives on the device: shuffling, flips and scaling cost no Python per image.

    Iterates like a DataLoader, over (images (B, 3, H, W) in [-1, 1], labels (B,)), as its `EpochPlan` says.
    """

    def __init__(self, dataset: ImageSet, plan: EpochPlan, device):
        self.dataset = ImageSet(dataset.images.to(device), dataset.labels.to(device))
        self.plan = plan

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.plan.set_epoch(epoch, first_batch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.dataset.images.device
        order, mirrored = self.plan.order.to(device), self.plan.mirrored.to(device)
        for rows in self.plan.rows():
            images, labels = self.dataset.images[order[rows]], self.dataset.labels[order[rows]]
            if self.plan.flip:
                images = torch.where(mirrored[rows, None, None, None], images.flip(-1), images)
            yield to_model_range(images), labels


class FilesLoader:
    """Batches from `ImageFiles`, read by a DataLoader as the `EpochPlan` says."""

    def __init__(self, dataset: ImageFiles, plan: EpochPlan, num_workers: int = 0):
        self.dataset = dataset
        self.plan = plan
        # A generator of its own: making an iterator draws a number, and must not from the one that training uses.
        self.loader = DataLoader(dataset, batch_sampler=plan, num_workers=num_workers, generator=torch.Generator())

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.plan.set_epoch(epoch, first_batch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def make_loader(
    dataset, batch_size: int, device, *, train=False, flip=False, seed=0, num_workers=0, part=(0, 1)
) -> ResidentLoader | FilesLoader:
    """A loader with `dataset`, `plan` and a length; `train` shuffles, and flips where `flip` says so.

    `part` is (this process, number of processes), as in `EpochPlan`.
    """
    plan = EpochPlan(len(dataset), batch_size, shuffle=train, flip=train and flip, seed=seed, part=part)
    if isinstance(dataset, ImageSet):
        return ResidentLoader(dataset, plan, device)
    return FilesLoader(dataset, plan, num_workers)
