"""Loaders: a data set in batches of images in [-1, 1], in an order that can be resumed and shared (2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ex2_data import ImageFiles, ImageSet, leave_signals_to_main, to_model_range
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
        """Plans an epoch from `first_batch` on; earlier batches were seen before the run was cut off."""
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
        """Where this process's images stand in `order`, batch by batch."""
        for batch in range(self.first_batch, self.batches):
            start, (own, _) = batch * self.batch_size, self.own_rows(batch)
            yield slice(start + own.start, start + own.stop)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for rows in self.rows():
            yield list(zip(self.order[rows].tolist(), self.mirrored[rows].tolist()))


class Loader:
    """Batches of a data set as its `EpochPlan` says: an iterable over (images (B, 3, H, W) in [-1, 1], labels (B,)).

    `inputs` yields what tells a batch from the others, `batch` makes its images, as a part of what a GPU records.
    """

    def __init__(self, dataset, plan: EpochPlan, device):
        self.dataset, self.plan, self.device = dataset, plan, torch.device(device)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.plan.set_epoch(epoch, first_batch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch(*inputs) for inputs in self.inputs())


class ResidentLoader(Loader):
    """Batches from an `ImageSet` that lives on the device: shuffling, flips and scaling cost no Python per image."""

    def __init__(self, dataset: ImageSet, plan: EpochPlan, device):
        super().__init__(ImageSet(dataset.images.to(device), dataset.labels.to(device)), plan, device)

    def inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices (B,), whether each image is mirrored (B,)), on the device, batch by batch."""
        order, mirrored = self.plan.order.to(self.device), self.plan.mirrored.to(self.device)
        return ((order[rows], mirrored[rows]) for rows in self.plan.rows())

    def batch(self, indices: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) of what `inputs` yields."""
        images = self.dataset.images[indices]
        if self.plan.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return to_model_range(images), self.dataset.labels[indices]


class FilesLoader(Loader):
    """Batches from `ImageFiles`, read by a DataLoader."""

    def __init__(self, dataset: ImageFiles, plan: EpochPlan, device, num_workers: int = 0):
        super().__init__(dataset, plan, device)
        # A generator of its own: making an iterator draws a number, and must not from the one that training uses.
        workers = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_main}
        self.loader = DataLoader(dataset, batch_sampler=plan, generator=torch.Generator(), **workers)

    def inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels), on the CPU, batch by batch."""
        return iter(self.loader)

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same images and labels, on the device."""
        return images.to(self.device), labels.to(self.device)


def make_loader(
    dataset, batch_size: int, device, *, train=False, flip=False, seed=0, num_workers=0, part=(0, 1)
) -> Loader:
    """The loader for a kind of data set; `train` shuffles, and flips where `flip` says so.

    `part` is (this process, number of processes), as in `EpochPlan`.
    """
    plan = EpochPlan(len(dataset), batch_size, shuffle=train, flip=train and flip, seed=seed, part=part)
    if isinstance(dataset, ImageSet):
        return ResidentLoader(dataset, plan, device)
    return FilesLoader(dataset, plan, device, num_workers)
