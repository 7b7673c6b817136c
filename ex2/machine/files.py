"""Files that a kill, a full disk or a flipped bit can't spoil unnoticed; names that every file system takes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

COMMANDS_NAME = "commands.txt"  # how everything in the folder was made
LONGEST_NAME = 120  # bytes of a file name that come from a label; file systems take 255 in all
STALE_SECONDS = 3600  # a temporary file of that age is of a process that was killed


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file. A kill or a full disk at any moment leaves the whole old file or the whole new one.

    Raises OSError: it can't be written, or reads back as something else.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a second command may write the same file
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


def remove_stale(folder: Path) -> None:
    """Removes temporary files that killed processes left."""
    for path in folder.glob("*.tmp"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def keep_beside(path: Path) -> Path:
    """Renames a file to the first free name of file.1, file.2, ... and returns that."""
    number = next(i for i in range(1, 10**6) if not path.with_name(f"{path.name}.{i}").exists())
    return path.rename(path.with_name(f"{path.name}.{number}"))


def file_name_of(label: str) -> str:
    """A label as a part of a file name: letters, digits, "_", "." and "-", at most `LONGEST_NAME` bytes."""
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", label))
    return name.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")


def number_name(value: float) -> str:
    """A number as a part of a file name, short but exact: two different numbers have two names."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


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


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file of a run; see `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def as_csv(rows: Iterable[Mapping], columns: Iterable[str]) -> str:
    """The text of a CSV file with a head."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append_command(folder: Path, command: str) -> None:
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
