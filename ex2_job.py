"""What a run needs on a machine that it shares: signals that end it in order, a lock on its folder, room on the disk, a
GPU with free memory, and batches that fit into it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ex2_data import SIGNALS, InputError
from ex2_distributed import is_main, is_restart, local_rank, started_by_torchrun, world_size
from ex2_replay import Replayed, free_memory

LOCK_NAME, HOLDER_NAME = ".lock", ".holder"  # the lock, which stays there; who has it
READERS_END = 6  # seconds that processes which read images outlive a killed run, and keep its lock
MACHINE_ENDS = 120  # the same where a job is started again, as its lock may be of a machine that broke down
BROKEN_PIPE = 128 + 13  # exit code of a program whose output nobody reads, as in `... | head`


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


@contextmanager
def handled_by(handler) -> Iterator[None]:
    """Sends `SIGNALS` to `handler`, and restores their old handlers at the end. In a thread nothing changes.

    What is ignored stays so: nohup starts a program without SIGHUP, a shell one in the background without SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interrupt(number: int, frame) -> None:
    """Signal handler: ends whatever is going on."""
    raise Interrupted(number)


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """Collects signals in the list that is yielded, so that a training step can end. A second Ctrl-C does not wait.

    Under torchrun it does: there a signal often comes twice, from its sender and from torchrun, which kills in the end.
    """
    waiting: list[int] = []

    def hold(number: int, frame) -> None:
        if waiting and number == signal.SIGINT and not started_by_torchrun():
            raise Interrupted(number)
        waiting.append(number)

    with handled_by(hold):
        yield waiting


def take_any_text() -> None:
    """Prints "?" for letters that an output's encoding lacks. Lines appear at once, in a log file, too."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # none at all, or that of a notebook
            stream.reconfigure(errors="replace", line_buffering=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of `folder`. The system frees the lock of a process that is gone.

    Raises InputError: another process works in the folder. Where the file system can't lock, a line says so.
    """
    if not is_main():  # of several processes the first one holds it for all
        yield
        return
    lock, holder = FileLock(folder / LOCK_NAME, mode=0o666), folder / HOLDER_NAME
    restarted = is_restart() or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    try:
        lock.acquire(timeout=MACHINE_ENDS if restarted else READERS_END)
    except (Timeout, NotImplementedError, OSError) as error:  # older versions of filelock wait where there are no locks
        if isinstance(error, Timeout) and holder.is_file():
            advice = f"wait for it, or choose another --run_name; if it is gone, delete {holder}"
            raise InputError(f"{holder.read_text()} works in {folder}: {advice}") from None
        print(f"{folder / LOCK_NAME} can't be locked: nothing keeps a second run out of this folder")
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def check_space(folder: Path, needed: int) -> None:
    """Raises an InputError where the disk has less than `needed` bytes left; a quota shows only in writing."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the run needs about {needed / 1e6:.0f} MB in {folder}, the disk has {free / 1e6:.0f} MB left: free some, "
            "or give another --results_dir"
        )


def pick_device(cuda: bool | None, num_threads: int | None = None) -> torch.device:
    """The visible GPU with the most free memory, or the CPU if there is none. Each of several processes has its own.

    cuda: insist on the GPU (True) or stay off it (False).  num_threads: of the CPU; None leaves it to torch.

    Raises InputError: the GPU is asked for and there is none.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if cuda and not torch.cuda.is_available():
        raise InputError("--cuda: torch finds no CUDA GPU here; drop the flag to run on the CPU")
    if cuda is False or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TensorFloat-32
    torch.backends.cudnn.benchmark = True  # batches are of one size
    if world_size() > 1:
        return own_gpu(local_rank())
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    device = torch.device("cuda", free.index(max(free)))
    torch.cuda.set_device(device)
    if len(free) > 1:
        print(f"{device} of {len(free)}, the one with the most free memory ({max(free) / 1e9:.1f} GB)")
    return device


def computes_in_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether training runs under autocast: "on", or "auto" where the hardware computes in bfloat16 itself.

    That is a GPU of compute capability 8, or a CPU with such instructions, of which torch tells from 2.11 on.

    Raises InputError: it is asked of a GPU that can't.
    """
    if device.type != "cuda":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        able = any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))
        return amp == "on" or (amp == "auto" and able)
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    if amp == "on" and not able:
        raise InputError("--amp on: this GPU can't compute in bfloat16; give --amp auto")
    return able and amp != "off"


def own_gpu(number: int) -> torch.device:
    """The GPU of process `number` of this machine.

    Raises InputError: it has fewer GPUs than processes.
    """
    if number >= torch.cuda.device_count():
        raise InputError(
            f"process {number} of this machine finds no GPU of its own ({torch.cuda.device_count()} visible): start "
            "torchrun with --nproc_per_node=gpu, or give --no_cuda"
        )
    return torch.device("cuda", number)


class FittingModel:
    """A noise predictor for evaluation and sampling, with the same predictions as `model`. On a GPU it replays calls,
    and splits batches that don't fit the memory.

    amp: compute in bfloat16, as the training did; for samples, whose losses nobody compares.
    """

    def __init__(self, model, amp: bool = False):
        self.model = model
        self.largest = None  # images per call; None while all have fitted
        self.predict = partial(predict, model, amp)
        self.replayed = Replayed(self.predict, what="the network call")

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Takes the model's arguments; each has one entry per image."""
        call = self.replayed if x.device.type == "cuda" else self.predict
        while True:
            size = self.largest or len(x)
            parts = zip(*(argument.split(size) for argument in (x, *conditions)))
            try:
                return torch.cat([call(*part)[0] for part in parts])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                self.largest = (min(size, len(x)) + 1) // 2
            free_memory()  # after the except block, which kept the failed call's tensors alive
            print(f"the GPU's memory is full: going on with {self.largest} images per network call")


@torch.no_grad()
def predict(model, amp: bool, x: Tensor, *conditions: Tensor) -> tuple[Tensor]:
    """A single call of the network, in bfloat16 where `amp` says so."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return (model(x, *conditions).float(),)


def batch_that_fits(attempt, batch_size: int) -> int:
    """The largest of batch_size / 2, / 4, ... for which `attempt(size)` fits the GPU's memory; 0 where none does."""
    size = batch_size // 2
    while size > 0:
        free_memory()
        try:
            attempt(size)
            return size
        except torch.cuda.OutOfMemoryError:
            size //= 2
    return 0
