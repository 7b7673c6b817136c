"""`check`: any solution of the exercise, judged by the facts of `ex2.grading.facts`, sub-task by sub-task.

A submission runs in a process of its own, which has a time limit for every fact and which can't end this one.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ex2.errors import InputError
from ex2.grading.facts import FACTS
from ex2.grading.submission import PREFIXES

ROOT = Path(__file__).resolve().parents[2]  # has the package `ex2`
START_LIMIT = 120  # seconds until Python and torch are there
LOUD = ("wrong", "fails", "hangs")  # verdicts in capitals


def check_solution(folder: Path, limit: float) -> list[dict]:
    """The verdict on every fact, in the order of the sheet.

    limit: seconds for each fact.

    Raises InputError: there is no solution in the folder.
    """
    files = [f"{prefix}{part}.py" for prefix in PREFIXES for part in ("diffusion", "model")]
    if not 0 < limit < 1e6:
        raise InputError(f"--time_limit must be above 0 and below a million seconds, got {limit:g}")
    if not any((folder / name).is_file() for name in files):
        raise InputError(f"{folder} holds no solution: none of {', '.join(files)}")
    left = sorted(FACTS, key=lambda name: FACTS[name].task)
    verdicts = []
    while left:
        for verdict in judged(folder.resolve(), left, limit):
            verdicts.append(verdict)
            left.remove(verdict["fact"])
    return verdicts


def judged(folder: Path, names: Sequence[str], limit: float) -> Iterator[dict]:
    """Verdicts of one process. If it hangs or ends, the last verdict says so of the fact it was at."""
    token = secrets.token_hex(8)  # so that nothing a solution prints is taken for a verdict
    command = [sys.executable, "-m", "ex2.grading.facts", str(folder), *names]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with tempfile.TemporaryDirectory() as elsewhere:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        own_group = {"start_new_session": os.name == "posix"}
        # What it writes beside itself is gone afterwards.
        process = subprocess.Popen(command, cwd=elsewhere, env=environment, **streams, **own_group)
        process.stdin.write(f"{token}\n".encode())
        process.stdin.close()
        lines: queue.Queue = queue.Queue()
        threading.Thread(target=read_lines, args=(process.stdout, token.encode(), lines), daemon=True).start()
        pending, patience = list(names), START_LIMIT
        try:
            while pending:
                message = lines.get(timeout=patience)
                patience = limit
                if message is None:
                    yield without_verdict(pending[0], "fails", "its code ended the program")
                    return
                if message:
                    del pending[0]
                    yield message
        except queue.Empty:
            yield without_verdict(pending[0], "hangs", f"no answer within {patience:g} s")
        finally:
            end(process)


def read_lines(stream, token: bytes, lines: queue.Queue) -> None:
    """Puts each verdict into the queue as it comes, and None at the end."""
    for line in stream:
        if line.startswith(token):
            lines.put(json.loads(line[len(token) :]))
    lines.put(None)


def end(process: subprocess.Popen) -> None:
    """Kills a process and, where the system can tell, those that it started."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def without_verdict(name: str, verdict: str, found: str) -> dict:
    """A verdict that the process itself could not give."""
    fact = FACTS[name]
    said = {"fact": name, "task": fact.task, "statement": fact.statement, "equation": fact.equation}
    return {**said, "verdict": verdict, "found": found, "expected": "", "looks_like": "", "adapted": []}


def as_lines(verdicts: Sequence[dict]) -> Iterator[str]:
    """The table for people, a line for each fact."""
    for verdict in verdicts:
        equation = f" ({verdict['equation']})" if verdict["equation"] else ""
        kind = verdict["verdict"].upper() if verdict["verdict"] in LOUD else verdict["verdict"]
        line = f"{verdict['task']:<8} {kind:<8} {verdict['statement']}{equation}"
        if verdict["verdict"] in ("wrong", "advice"):
            looks_like = f": {verdict['looks_like']}" if verdict["looks_like"] else ""
            yield f"{line}\n{'':18}found {verdict['found']}, expected {verdict['expected']}{looks_like}"
        else:
            yield f"{line}\n{'':18}{verdict['found']}" if verdict["found"] else line
    right = sum(verdict["verdict"] == "right" for verdict in verdicts)
    advice = sum(verdict["verdict"] == "advice" for verdict in verdicts)
    yield f"{right} of {len(verdicts)} facts are right" + (f", {advice} are advice" if advice else "")
    for text in sorted({text for verdict in verdicts for text in verdict["adapted"]}):
        yield f"adapted: {text}"
