"""Errors that end the program with one line, and the exit code of each."""

from __future__ import annotations

import errno
import os
import signal
import sys

BROKEN_PIPE = 128 + 13  # exit code of a program whose output nobody reads, as in `... | head`


class InputError(ValueError):
    """What the user gave can't be used; the message is one line that says what, where and what to do."""


class RunError(RuntimeError):
    """A run can't go on, and the command line is not the reason. The message is one line."""


class ReadingError(RunError):
    """Images can't be read: a DataLoader worker was killed or hangs, or the memory is full. A training is saved."""


class ProcessesError(RuntimeError):
    """The processes of a run lost each other; the message is one line."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


def exit_code_of(error: BaseException) -> tuple[int | None, str]:
    """(exit code, line) of what ended the program; the code is None for a fault of the program itself.

    2 is for input that can't be used, 1 for a fault while running, 128 + n for signal n.
    """
    if isinstance(error, Interrupted):
        saved = "a training that was going on is saved: the same command goes on with it"
        return 128 + error.number, f"{process_prefix()}{error}; {saved}"
    if isinstance(error, BrokenPipeError):
        sys.stdout = None  # nobody reads it any more
        return BROKEN_PIPE, line_of("nobody reads the output any more; a training that was going on is saved")
    if isinstance(error, InputError):
        return 2, line_of(str(error))
    if isinstance(error, (RunError, ProcessesError, OSError, FloatingPointError)):
        full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        return 1, line_of(f"{error}{'; free some space: the same command goes on from what is saved' if full else ''}")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        return 1, line_of("the GPU's memory is full: lower --batch_size or --dim")
    if "DataLoader worker (pid" in str(error):  # torch's handler of signals raises wherever the program is
        return 1, line_of(f"{str(error).strip()}: lower --num_workers, or free memory and shared memory (/dev/shm)")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return 1, line_of("the memory is full: lower --batch_size, --sample_batch or --dim")
    if is_compiler_error(error):
        reason = str(error).strip().splitlines()[0]
        advice = "give --compile auto or off"
        return 1, line_of(f"--compile on: torch can't compile the network here ({reason}); {advice}")
    return None, ""


def line_of(what: str) -> str:
    """The line that says what ended the program."""
    return f"{process_prefix()}error: {what}"


def process_prefix() -> str:
    """For messages: "" for the first or only process of torchrun, else its number."""
    number = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    return "" if number == "0" else f"process {number}: "


def job_number(name: str) -> int:
    """The whole number in an environment variable of a job (torchrun, SLURM); 0 where it is empty or not there.

    Raises InputError: it holds something else.
    """
    value = os.environ.get(name, "").strip() or "0"
    try:
        return int(value)
    except ValueError:
        raise InputError(f"the environment variable {name} is {value!r}, which is no whole number: unset it") from None


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch could not compile, as without a C++ compiler or Triton."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
