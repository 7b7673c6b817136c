"""The process of a submission, seen from outside: it is asked for results, and ended with what it started.

It has limits of time and of what it may say, and an environment without the user's variables. It may still read and
write files, start programs that use the network or hide from here, and signal other processes: README has the command
for a sandbox.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from ex2.grading.adapter import PARTS, PREFIXES
from ex2.grading.submission import pack, unpack
from ex2.grading.verdicts import NotRight

START_LIMIT = 120  # seconds until Python and torch are there
WALL = 10  # seconds on the clock for each second of CPU time: in a busy pool others compute as well
MAX_LOST = 3  # processes of one submission that hang or end: the rest of its facts is not tried
MAX_ANSWER, MAX_TEXT = 2**23, 300  # bytes, characters
KEPT = "PATH LANG LC_ALL LD_LIBRARY_PATH PYTHONPATH SYSTEMROOT".split()  # of the user's variables
PART_OF = {"forward": "model", "run_test": "main", "saved_greys": "main", "outline": "main"}  # others: diffusion
STOPPED = threading.Event()  # by Ctrl-C
ROOT = str(Path(__file__).parents[2])
START = f"import sys; sys.path[0] = {ROOT!r}; from ex2.grading.submission import main; main(sys.argv[1])"


class Worker:
    """A submission in a process of its own: it has the methods of `Submission`. A lost process is begun anew.

    Args:
        limit: CPU seconds for each fact.

    Attributes:
        outline: what is plain in the source of its main file.
        where, adapted: file and line of the function that the last fact called, and what had to be done to call it.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit, self.process, self.lost, self.requests = folder, limit, None, 0, 0
        self.last = time.monotonic() + START_LIMIT + 2 * WALL * limit  # when all must be done
        self.outline, self.broken = {}, {}  # what can't be imported is known once, and not tried for every fact
        problem = find_problem(folder)
        for part in PARTS:
            self.begin()
            try:
                if problem:
                    raise NotRight("missing", problem)
                if part == "main":
                    self.outline = self.call("outline")
                self.call("load", part)
            except NotRight as error:
                start = "" if error.verdict == "missing" else f"import of {part}: "
                self.broken[part] = NotRight(error.verdict, start + error.found)

    def __getattr__(self, name: str):
        return partial(self.call, name)

    def begin(self) -> None:
        """Begins a fact, and its time."""
        self.where, self.adapted, self.fresh, self.begun = "", set(), True, time.monotonic()

    def call(self, name: str, *args, **given):
        """What a method of the submission returns. Raises NotRight: it "fails", "hangs" or is "missing"."""
        part = args[0] if name in ("load", "takes") else PART_OF.get(name, "diffusion")
        if part in self.broken:
            raise self.broken[part]
        self.requests += 1
        request = {"id": self.requests, "call": name, "args": args, "given": given}
        request["seconds"], self.fresh = self.limit if self.fresh else None, False
        answer = self.ask(json.dumps(request, default=pack))
        try:
            answer = json.loads(answer)
            if answer["id"] != self.requests:
                raise ValueError("of another request")
            self.where = printable(answer["where"])
            self.adapted.update(printable(text) for text in answer["adapted"][:20])
            for verdict in {"missing", "fails"} & answer.keys():
                raise NotRight(verdict, printable(answer[verdict]))
            return json.loads(answer["value"], object_hook=unpack)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.lose()
            raise NotRight("fails", "its process said something else than an answer") from error

    def ask(self, line: str) -> bytes:
        """The answer to a request. Raises NotRight: there is none."""
        if STOPPED.is_set() or self.lost >= MAX_LOST or time.monotonic() > self.last:
            raise NotRight("hangs", "not tried: what came before took all the time")
        if self.process is None:
            self.start()
        seconds = min(self.begun + WALL * self.limit, self.last) - time.monotonic()
        answer = self.exchange(line.encode() + b"\n", seconds)
        if answer.endswith(b"\n"):
            return answer
        code = self.lose()
        if code is not None and -code == getattr(signal, "SIGXCPU", None):
            raise NotRight("hangs", f"no answer within {self.limit:g} s of CPU time")
        raise NotRight("fails", "its answer is too long" if answer else "its code ended the program")

    def start(self) -> None:
        self.home = tempfile.mkdtemp()
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment.update(HOME=self.home, TMPDIR=self.home, PYTHONUSERBASE=site.getuserbase())
        environment.update(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", PYTHONDONTWRITEBYTECODE="1")
        environment.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        command = [sys.executable, "-c", START, str(self.folder)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=self.home, env=environment, **streams, start_new_session=True)
        self.exchange(b"", START_LIMIT)
        self.begun = time.monotonic()

    def exchange(self, line: bytes, seconds: float) -> bytes:
        """Writes a line and reads one, in a thread, as the submission need neither read nor write."""
        answers, until = queue.Queue(), time.monotonic() + seconds
        threading.Thread(target=write_and_read, args=(self.process, line, answers), daemon=True).start()
        while time.monotonic() < until and not STOPPED.is_set():
            with suppress(queue.Empty):
                return answers.get(timeout=0.5)
        self.lose()
        raise NotRight("hangs", f"no answer within {seconds:.0f} s")

    def lose(self) -> int | None:
        """Ends a process that is of no more use; its exit code, if it had ended by itself."""
        self.lost += 1
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        code = self.process.poll()
        self.close()
        return code

    def close(self) -> None:
        """Kills the process and, on Linux, what it started, unless that left both its environment and its folder."""
        if self.process is None:
            return
        with suppress(OSError, AttributeError):  # not on Windows
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        while kill_all_of(self.home):
            pass
        with suppress(OSError):
            self.process.stdin.close()
        shutil.rmtree(self.home, ignore_errors=True)
        self.process = None


def write_and_read(process: subprocess.Popen, line: bytes, answers: queue.Queue) -> None:
    answer = b""
    with suppress(OSError, ValueError):  # it is no more: so there is no answer either
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline(MAX_ANSWER)
    answers.put(answer)


def kill_all_of(home: str) -> int:
    """Kills the processes that have a home in their environment or work in it (Linux); how many."""
    killed = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if home.encode() in (path / "environ").read_bytes() or os.readlink(path / "cwd") == os.path.realpath(home):
                os.kill(int(path.name), signal.SIGKILL)
                killed += 1
    return killed


def find_problem(folder: Path) -> str | None:
    """Why nothing in a folder can be judged, with the files that may be meant."""
    files = [f"{prefix}{part}.py" for prefix in PREFIXES for part in ("diffusion", "model")]
    if any((folder / name).is_file() for name in files):
        return None
    near = sorted(printable(path.relative_to(folder)) for path in folder.rglob("*ex*2*diffusion*.py"))[:3]
    return f"none of {', '.join(files)}" + (f"; is {' or '.join(near)} meant?" if near else "")


def printable(text) -> str:
    """Text of a submission without control characters, and no more than fits a line or three."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MAX_TEXT])
