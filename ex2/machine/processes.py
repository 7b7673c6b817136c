"""Several processes that train one model, started by torchrun: who they are, what each takes, how they agree.

Every process runs the same program. Work on images is sharded (`shard`) and its results are put together again
(`all_gather`, `all_reduce`), so every process has the same metrics; files are the first process's business (`is_main`).
In a program that torchrun didn't start there is one process, and all of this does nothing.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ex2.errors import ProcessesError, job_number

T = TypeVar("T")
_timeout = datetime.timedelta(minutes=30)  # how long a process waits for the others
END_TIMEOUT = datetime.timedelta(days=1)
LOST_WORDS = ("gloo", "Connection", "connection", "NCCL", "timed out", "Timed out")  # in errors of lost processes
_cpu_group = None  # gloo, for metrics and files, also where the gradients go by nccl


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _cpu_group is not None else 1


def rank() -> int:
    """The number of this process, 0 .. world_size() - 1."""
    return dist.get_rank() if _cpu_group is not None else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def local_rank() -> int | None:
    """The number of this process on its machine; None where torchrun didn't start it."""
    return job_number("LOCAL_RANK") if started_by_torchrun() else None


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def is_restart() -> bool:
    """Whether torchrun started this process anew after another one died."""
    return job_number("TORCHELASTIC_RESTART_COUNT") > 0


@contextmanager
def connect_processes(cuda: bool | None, timeout_minutes: float) -> Iterator[None]:
    """Connects the processes that torchrun started, if it did. All but the first print nothing but errors.

    Args:
        cuda: False disables the GPUs.
        timeout_minutes: how long to wait for a process before it counts as lost.

    Raises ProcessesError: they don't find each other.
    """
    if not started_by_torchrun() or job_number("WORLD_SIZE") <= 1:
        yield
        return
    global _cpu_group, _timeout
    _timeout = datetime.timedelta(minutes=timeout_minutes)
    gpu = cuda is not False and torch.cuda.is_available()
    if gpu and local_rank() < torch.cuda.device_count():  # pick_device says so if it isn't
        torch.cuda.set_device(local_rank())
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=_timeout))
        # Torchrun's store outlives the processes: under its own name a restart doesn't find where the dead ones were.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {count}", store)
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_timeout)
        _cpu_group = dist.new_group(backend="gloo", timeout=_timeout)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessesError(f"the processes don't find each other at {where}: {str(error).splitlines()[0]}") from error
    try:
        with open(os.devnull, "w") as nowhere:
            # No terminal, so that tqdm draws no bars: those of several processes would mix.
            errors = SimpleNamespace(write=sys.stderr.write, flush=sys.stderr.flush, isatty=lambda: False)
            out, err = (sys.stdout, sys.stderr) if is_main() else (nowhere, errors)
            with redirect_stdout(out), redirect_stderr(err), name_lost_processes():
                yield
                barrier("the end", END_TIMEOUT)  # the first one is still drawing
        dist.destroy_process_group()
    finally:
        _cpu_group = None


@contextmanager
def name_lost_processes() -> Iterator[None]:
    """Turns what torch raises when another process is gone into a ProcessesError of one line."""
    try:
        yield
    except RuntimeError as error:
        of_nccl = isinstance(error, getattr(dist, "DistBackendError", ()))  # gloo has no class for it
        if isinstance(error, ProcessesError) or not (of_nccl or any(word in str(error) for word in LOST_WORDS)):
            raise
        raise ProcessesError(f"another process is gone ({str(error).splitlines()[0]})") from error


def shard(count: int, part: tuple[int, int] | None = None) -> range:
    """Which of `count` things in a row are this process's; the shards differ by one at most.

    part: (rank, world size), if not those of this process.
    """
    index, parts = part or (rank(), world_size())
    return range(count * index // parts, count * (index + 1) // parts)


def barrier(what: str, timeout: datetime.timedelta | None = None) -> None:
    """Waits until all processes are here, at most for `timeout` or for the time that `connect_processes` was given.

    Raises ProcessesError: some are not there in time; names them.
    """
    if world_size() == 1:
        return
    try:
        dist.monitored_barrier(_cpu_group, timeout or _timeout, wait_all_ranks=True)
    except RuntimeError as error:
        waited = f"up to {(timeout or _timeout).total_seconds() / 60:g} min (--timeout_minutes)"
        who, reason = f"process {rank()} of {world_size()}", str(error).splitlines()[0]
        raise ProcessesError(f"{who} waited for the others at '{what}', {waited}: {reason}") from error


def all_gather(own, what: str) -> list:
    """A list of the processes' `own` values, in the order of their numbers; the same list on every process."""
    if world_size() == 1:
        return [own]
    barrier(what)
    parts = [None] * world_size()
    dist.all_gather_object(parts, own, group=_cpu_group)
    return parts


def all_gather_rows(own: list[Tensor], what: str) -> Tensor:
    """The rows of all processes' tensors in one tensor, those of the first process first."""
    return torch.cat([rows for part in all_gather(own, what) for rows in part] or [torch.empty(0)])


def all_reduce(own: Tensor, what: str) -> Tensor:
    """The sum of all processes' tensors on the CPU; the same bits on every process."""
    return torch.stack(all_gather(own, what)).sum(0)


def broadcast_from_main(make: Callable[[], T], what: str) -> T:
    """Calls `make()` on the first process alone, and returns its result on every process."""
    if world_size() == 1:
        return make()
    holder = [make() if is_main() else None]
    barrier(what)
    dist.broadcast_object_list(holder, src=0, group=_cpu_group)
    return holder[0]


def main_process_first(make: Callable[[], T], what: str) -> T:
    """Calls `make()` on every process: first on the first one, then on the first of each machine, then on the others.

    So that the first one downloads, and the others find what it downloaded, whether or not machines share a disk.
    """
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for now in range(3):
        if now == turn:
            made = make()
        barrier(what)
    return made


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of all processes' values, on their device; nothing waits for a GPU."""
    if world_size() > 1:
        value = value / world_size()
        dist.all_reduce(value)
    return value


def all_reduce_max(signal_number: int, seconds: float) -> tuple[int, float]:
    """The largest signal number (0: none) and the longest time that any process reports after a step.

    So all stop after the same step, and have the same learning rate.
    """
    if world_size() == 1:
        return signal_number, seconds
    report = torch.tensor([signal_number, seconds], dtype=torch.float64)
    dist.all_reduce(report, dist.ReduceOp.MAX, _cpu_group)
    return int(report[0]), float(report[1])
