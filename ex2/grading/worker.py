"""The process of a submission, seen from outside: it is asked for results, and ended with all that it started.

It has limits of time and of what it may say, and an environment without the user's variables. It may still read and
write files, start programs that use the network, and signal other processes: README has the command for a sandbox.
"""

from __future__ import annotations

import json
import math
import os
import queue
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

from ex2.grading import submission
from ex2.grading.facts import Failed
from ex2.grading.submission import PARTS, Missing, pack, unpack

START_LIMIT = 120  # seconds until Python and torch are there
WALL = 10  # seconds on the clock for each second of CPU time: in a busy pool others compute as well
MAX_LOST = 3  # processes of one submission that hang or end: the rest of its facts is not tried
MAX_ANSWER, MAX_TEXT = 2**23, 300  # bytes, characters
KEPT = "PATH LANG LC_ALL LD_LIBRARY_PATH PYTHONPATH SYSTEMROOT".split()  # of the user's variables
RUNNING: set[int] = set()  # processes of submissions
LOCK = threading.Lock()  # of RUNNING
STOPPED = threading.Event()  # by Ctrl-C
# Where the function of a call stands.
PLACES = {
    "load": "{}",
    "q_sample": "diffusion.Diffusion.q_sample",
    "p_sample": "diffusion.Diffusion.p_sample",
    "guide": "diffusion.Diffusion.{}",
    "sample": "diffusion.Diffusion.sample",
    "loss": "diffusion.Diffusion.p_losses",
    "schedule": "diffusion.{}_beta_schedule",
    "forward": "model.Unet.forward",
    "run_test": "main.test",
    "saved_greys": "main.sample_and_save_images",
}


class Remote:
    """A submission in another process: its methods are those of `ex2.grading.submission.Submission`.

    Attributes:
        outline: what is plain in its source.
        adapted: what had to be done to call the functions of the last fact.
        place: file and line of the function that was called last.
    """

    def __init__(self):
        self.adapted, self.place, self.requests, self.fresh, self.broken = set(), "", 0, True, {}
        self.outline = {"lines": {}, "test_is_empty": False, "eval_elsewhere": False, "settings": None}
        self.outline.update(fid_images=None, missing={})
        with suppress(Failed):  # a source that Python's parser does not survive: importing it will tell
            self.outline = self.call("outline")
        # What can't be imported is known once, and not tried for every fact.
        self.broken = {part: Missing(printable(text)) for part, text in self.outline["missing"].items()}
        for part in sorted({*PARTS} - {*self.broken}, key=PARTS.index):
            try:
                self.begin()
                self.call("load", part=part)
            except Failed as error:
                self.broken[part] = Failed(f"import of {part}: {error}", error.verdict)
            except Missing as error:
                self.broken[part] = error

    def ask(self, line: str) -> str | bytes:
        """The answer to a request; raises `Failed`: there is none."""
        raise NotImplementedError

    def lose(self) -> None:
        """Gives the process up: what it says is no answer."""

    def __getattr__(self, name: str):
        return partial(self.call, name)

    def begin(self) -> None:
        """Begins a fact, and its time."""
        self.adapted, self.place, self.fresh = set(), "", True

    def call(self, name: str, *args, **given):
        """What a method of the submission returns; raises `Missing` or `Failed`."""
        method = getattr(submission.Submission, name)
        given.update(zip(method.__code__.co_varnames[1:], args))
        place = PLACES.get(name, "{}.{}" if name == "takes" else "")
        place = place.format(*(value for value in given.values() if isinstance(value, str)))
        part = place.split(".")[0]
        if part in self.broken:
            raise self.broken[part]
        self.place = self.outline["lines"].get(place, self.place)
        self.requests += 1
        request = {"call": name, "given": given, "id": self.requests, "fresh": self.fresh}
        self.fresh = False
        answer = self.ask(json.dumps(request, default=pack))
        try:
            answer = json.loads(answer, object_hook=unpack)
            if answer["id"] != self.requests:
                raise ValueError("of another request")
            self.adapted.update(printable(text) for text in answer["adapted"][:20])
            if "missing" in answer:
                raise Missing(printable(answer["missing"]))
            if "fails" in answer:
                raise Failed(printable(answer["fails"]))
            return answer["value"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.lose()
            raise Failed("its process said something else than an answer") from error


class Worker(Remote):
    """A submission and its process; a new one is begun where it was lost.

    Args:
        limit: CPU seconds for each fact.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit, self.process, self.lost = folder, limit, None, 0
        self.begun, self.last = 0.0, math.inf  # when this fact began, and when all must be done
        super().__init__()

    def begin(self) -> None:
        self.begun = time.monotonic()
        super().begin()

    def ask(self, line: str) -> bytes:
        if STOPPED.is_set() or self.lost >= MAX_LOST or time.monotonic() > self.last:
            raise Failed("not tried: what came before took all the time", "hangs")
        if self.process is None:
            self.start()
        # A thread, as the submission need not read what it is asked.
        threading.Thread(target=write_line, args=(self.process.stdin, line), daemon=True).start()
        until = min(self.begun + WALL * self.limit, self.last)
        return self.receive(until - time.monotonic(), f"{WALL * self.limit:g} s")

    def start(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment.update(HOME=self.home.name, TMPDIR=self.home.name, PYTHONUSERBASE=site.getuserbase())
        environment.update(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", PYTHONDONTWRITEBYTECODE="1")
        environment.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        command = [sys.executable, submission.__file__, str(self.folder), str(self.limit)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        own_session = {"start_new_session": os.name == "posix"}
        with LOCK:
            self.process = subprocess.Popen(command, cwd=self.home.name, env=environment, **streams, **own_session)
            RUNNING.add(self.process.pid)
        self.answers: queue.Queue = queue.Queue(maxsize=1)
        threading.Thread(target=read_lines, args=(self.process.stdout, self.answers), daemon=True).start()
        self.receive(START_LIMIT, f"{START_LIMIT} s to start")
        self.begun = time.monotonic()
        self.last = min(self.last, self.begun + 2 * WALL * self.limit)

    def receive(self, seconds: float, allowed: str) -> bytes:
        try:
            line = self.answers.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            self.lose()
            raise Failed(f"no answer within {allowed}", "hangs") from None
        if line.endswith(b"\n"):
            return line
        code = self.lose()
        if code is not None and -code == getattr(signal, "SIGXCPU", None):
            raise Failed(f"no answer within {self.limit:g} s of CPU time", "hangs")
        raise Failed("its answer is too long" if line else "its code ended the program")

    def lose(self) -> int | None:
        """Ends a process that is of no more use; its exit code, if it had ended by itself."""
        self.lost += 1
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        code = self.process.poll()
        self.close()
        return code

    def close(self) -> None:
        """Kills the process and, where the system can tell, all that it started."""
        if self.process is None:
            return
        if os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        RUNNING.discard(self.process.pid)
        while kill_orphans():
            pass
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(OSError):
            self.home.cleanup()
        self.process = None


def write_line(stream, line: str) -> None:
    with suppress(OSError, ValueError):  # it is no more: so there is no answer either
        stream.write(line.encode() + b"\n")
        stream.flush()


def read_lines(stream, lines: queue.Queue) -> None:
    """Puts each answer into the queue; one that is too long, or that nobody waits for, is the last."""
    with suppress(queue.Full):
        while True:
            line = stream.readline(MAX_ANSWER)
            lines.put_nowait(line)
            if not line.endswith(b"\n"):
                return


def adopt_orphans() -> None:
    """Makes processes whose parents end children of this one (Linux), so that none is left behind."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill_orphans() -> int:
    """Kills children of this process that submissions have left; how many."""
    killed = 0
    for path in Path("/proc").glob("[0-9]*/stat") if sys.platform == "linux" else ():
        with LOCK, suppress(OSError):
            _, parent, _, session = path.read_bytes().rpartition(b")")[2].split()[:4]
            if int(parent) == os.getpid() and int(session) not in (os.getsid(0), *RUNNING):
                os.kill(int(path.parent.name), signal.SIGKILL)
                os.waitpid(int(path.parent.name), 0)
                killed += 1
    return killed


def printable(text) -> str:
    """Text of a submission without control characters, and no more than fits a line or three."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MAX_TEXT])


def end_all() -> None:
    """Ends all submissions for good."""
    STOPPED.set()
    for pid in tuple(RUNNING):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
