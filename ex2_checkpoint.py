"""The files of a run: checkpoints that a kill, a full disk or a flipped bit can't spoil unnoticed, and the log."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import sys
import time
from pathlib import Path

import torch

from ex2_data import InputError

LOG_COLUMNS = ("step", "epoch", "seconds", "lr", "grad_norm", "train_loss", "epoch_loss", "val_loss")
CHECKPOINT_FORMAT = 3
CHECKPOINT_NAME = "ckpt.pt"
PREVIOUS = ".previous"  # ending of the checkpoint before the newest
COMMANDS_NAME = "commands.txt"  # how everything in the folder was made


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file. A kill or a full disk at any moment leaves the whole old file or the whole new one.

    Raises OSError: it can't be written, or reads back as something else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if hashlib.sha256(temporary.read_bytes()).digest() != hashlib.sha256(content).digest():
            raise OSError(f"{temporary} reads back as something else than was written: is the disk all right?")
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as of a full disk; nobody would know which
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def digest_of(content) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values, as hexadecimal digits."""
    digest = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list {len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def save_checkpoint(path: Path, **content) -> None:
    """Writes a plain dict of tensors and Python values with its digest. An older checkpoint becomes `PREVIOUS`.

    Raises OSError: it can't be written; what was there is still there.
    """
    buffer = io.BytesIO()  # torch's own writer would turn "no space left" into an error of its own
    torch.save({"format": CHECKPOINT_FORMAT, "sha256": digest_of(content), **content}, buffer)
    new = path.with_name(path.name + ".new")
    write_atomically(new, buffer.getbuffer())
    if path.is_file():
        os.replace(path, path.with_name(path.name + PREVIOUS))
    os.replace(new, path)


def load_checkpoint(path: str | Path, device="cpu") -> dict:
    """The content of a checkpoint file, or the newest good one in the folder of a run. Runs no code from the file.

    Raises InputError: there is none, it is damaged, or it is no checkpoint of this program.
    """
    path = Path(path)
    if not path.is_dir():
        return read_checkpoint(path, device)
    newest = path / CHECKPOINT_NAME
    candidates = [newest.with_name(newest.name + suffix) for suffix in (".new", "", PREVIOUS)]
    candidates = [candidate for candidate in candidates if candidate.is_file()] or [newest]
    for candidate in candidates[:-1]:
        try:
            return read_checkpoint(candidate, device)
        except InputError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return read_checkpoint(candidates[-1], device)


def read_checkpoint(path: Path, device="cpu") -> dict:
    """The content of one checkpoint file; errors as in `load_checkpoint`."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give --checkpoint a run's folder, or train first")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged or no checkpoint: it holds more than tensors and plain values") from error
    except Exception as error:  # torch and pickle raise many kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is no checkpoint of this program, or of another version of it")
    content.pop("format")
    if content.pop("sha256", None) != digest_of(content):  # torch reads changed bytes without complaint
        raise InputError(f"{path} is damaged: its content does not match its digest")
    return content


def read_json(path: Path) -> dict:
    """The content of a JSON file of a run. Empty if there is no file, or, with a message, if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content:
        print(f"{path} is damaged or of another program: left out")
        return {}
    return content


def note_command(folder: Path, command: str) -> None:
    """Adds a command to the end of the list in a run's folder. A command stands there once."""
    command = command.encode("utf-8", "replace").decode()
    lines = [line for line in read_commands(folder) if line != command] + [command, ""]
    write_atomically(folder / COMMANDS_NAME, "\n".join(lines).encode())


def read_commands(folder: Path) -> list[str]:
    """The commands that were called in the folder of a run, the latest one last."""
    try:
        return (folder / COMMANDS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


class RunLog:
    """log.csv of a run: a row per log interval and per epoch; empty cells where a row has no such figure.

    epochs_done, step: where the run stands. Later rows, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, epochs_done: int = 0, step: int = 0):
        self.path = path
        rows = self.rows() if step > 0 and path.is_file() else []
        kept = [row for row in rows if self.belongs(row, epochs_done, step)]
        self.started = time.perf_counter() - (float(kept[-1]["seconds"] or 0) if kept else 0)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue().encode())

    @staticmethod
    def belongs(row: dict, epochs_done: int, step: int) -> bool:
        """Whether a row belongs to finished work. The last row of an epoch comes after its validation."""
        return int(row["epoch"]) < epochs_done or (int(row["step"]) <= step and row["val_loss"] == "")

    def write(self, **figures) -> None:
        row = {"seconds": f"{time.perf_counter() - self.started:.1f}", **figures}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)

    def rows(self) -> list[dict]:
        return self.read(self.path)

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The whole rows of a log.csv, every cell a string; a row that was cut off or is no row of ours is left out."""
        try:
            text = path.read_bytes().decode("utf-8", "replace").replace("\0", "?")
        except OSError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole, newline="")) if is_row(row)]


def is_row(row: dict) -> bool:
    """Whether a row has all columns of a log, with numbers in them or nothing."""
    try:
        numbers = [float(cell) for cell in row.values() if cell != ""]
        return tuple(row) == LOG_COLUMNS and len(numbers) >= 3 and int(row["step"]) >= 0 and int(row["epoch"]) >= 0
    except (TypeError, ValueError):
        return False
