"""What a run needs on a machine that it shares: signals that end it in order, a lock on its folder, room on the disk, a
GPU with free memory, and batches that fit into it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ex2.errors import InputError, Interrupted, job_number
from ex2.machine.cuda_graphs import free_memory
from ex2.machine.files import remove_stale
from ex2.machine.processes import is_main, is_restart, local_rank, started_by_torchrun, world_size

# Everything that a scheduler, a terminal or a limit sends to end a program; what denotes a fault of it is left alone.
ENDINGS = "TERM INT HUP QUIT USR1 USR2 XCPU ALRM VTALRM PWR BREAK"
SIGNALS = [getattr(signal, f"SIG{name}") for name in ENDINGS.split() if hasattr(signal, f"SIG{name}")]
LOCK_NAME, HOLDER_NAME = ".lock", ".holder"  # the lock, which stays there; who has it
WORKER_EXIT_SECONDS = 6  # DataLoader workers may hold the lock this long after a kill
STALE_LOCK_SECONDS = 120  # the same where a job is started again, as its lock may be of a machine that broke down


@contextmanager
def handle_signals(handler) -> Iterator[None]:
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
def hold_signals() -> Iterator[list[int]]:
    """Collects signals in the list that is yielded, so that a training step can end. A second Ctrl-C does not wait.

    Under torchrun it does: there a signal often comes twice, from its sender and from torchrun, which kills in the end.
    """
    waiting: list[int] = []

    def hold(number: int, frame) -> None:
        if waiting and number == signal.SIGINT and not started_by_torchrun():
            raise Interrupted(number)
        waiting.append(number)

    with handle_signals(hold):
        yield waiting


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps a second run out of `folder`. The system frees the lock of a process that is gone.

    Raises InputError: another process works in the folder. Where the file system can't lock, a line says so.
    """
    if not is_main():  # of several processes the first one holds it for all
        yield
        return
    lock, holder = FileLock(folder / LOCK_NAME, mode=0o666), folder / HOLDER_NAME
    restarted = is_restart() or job_number("SLURM_RESTART_COUNT") > 0
    try:
        lock.acquire(timeout=STALE_LOCK_SECONDS if restarted else WORKER_EXIT_SECONDS)
    except (Timeout, NotImplementedError, OSError) as error:
        if isinstance(error, Timeout) and can_lock(folder):
            who = holder.read_text() if holder.is_file() else "another process"
            raise InputError(f"{who} works in {folder}: wait for it, or choose another --run_name") from None
        print(f"{folder / LOCK_NAME} can't be locked: nothing keeps a second run out of this folder")
    remove_stale(folder)
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        if [path.name for path in folder.iterdir()] == [LOCK_NAME]:  # nothing came of the run
            with suppress(OSError):
                (folder / LOCK_NAME).unlink()
                folder.rmdir()


def can_lock(folder: Path) -> bool:
    """Whether the file system of a folder knows locks; of others filelock waits as if somebody had one."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with FileLock(probe).acquire(timeout=0):
            return True
    except (Timeout, NotImplementedError, OSError):
        return False
    finally:
        probe.unlink(missing_ok=True)


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

    Args:
        cuda: require (True) or disable (False) the GPU; None uses one if there is one.
        num_threads: of the CPU; None leaves it to torch.

    Raises InputError: the GPU is asked for and there is none, or fewer than processes.
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
        if local_rank() >= torch.cuda.device_count():
            who, visible = f"process {local_rank()} of this machine", f"({torch.cuda.device_count()} visible)"
            advice = "start torchrun with --nproc_per_node=gpu, or give --no_cuda"
            raise InputError(f"{who} finds no GPU of its own {visible}: {advice}")
        return torch.device("cuda", local_rank())
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    device = torch.device("cuda", free.index(max(free)))
    torch.cuda.set_device(device)
    if len(free) > 1:
        print(f"{device} of {len(free)}, the one with the most free memory ({max(free) / 1e9:.1f} GB)")
    return device


def computes_in_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether training runs under autocast: "on", or "auto" where the hardware computes in bfloat16 itself.

    That is a GPU of compute capability 8, or a CPU with AMX, of which torch tells from 2.11 on. Other CPUs have such
    instructions too, and a step takes 1.4 times as long with them.

    Raises InputError: it is asked of a GPU that can't.
    """
    if device.type != "cuda":
        able = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        return amp == "on" or (amp == "auto" and able)
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    if amp == "on" and not able:
        raise InputError("--amp on: this GPU can't compute in bfloat16; give --amp auto")
    return able and amp != "off"


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


def ignore_signals(worker: int) -> None:
    """In a DataLoader worker: a signal to the whole group must not end it while its batch is read."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kills DataLoader workers that still read when the program ends. Python would send SIGTERM, which they ignore."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a fault
    for process in workers:
        process.kill()
