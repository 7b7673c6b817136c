"""log.csv: what a training writes down as it goes."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

from ex2.machine.files import as_csv, keep_beside, write_atomically

LOG_COLUMNS = ("step", "epoch", "seconds", "lr", "grad_norm", "train_loss", "epoch_loss", "val_loss")


class RunLog:
    """log.csv of a run: a row per log interval and per epoch; empty cells where a row has no such number.

    Rows after the checkpoint, left by a run that was cut off, are dropped. A file that is not understood, as a
    spreadsheet saves it, is kept beside as log.csv.1.

    Args:
        path: of the file.
        epochs_done: epochs that are over.
        step: the last one that belongs to a row.
    """

    def __init__(self, path: Path, epochs_done: int = 0, step: int = 0):
        self.path = path
        rows = self.read(path)
        if path.is_file() and not is_understood(path.read_bytes(), rows):
            print(f"{path} is not as this program wrote it: kept as {keep_beside(path)}")
        kept = [
            row
            for row in rows  # the last one of an epoch comes after its validation
            if int(row["epoch"]) < epochs_done or (int(row["step"]) <= step and row["val_loss"] == "")
        ]
        self.started = time.perf_counter() - (float(kept[-1]["seconds"] or 0) if kept else 0)
        write_atomically(path, as_csv(kept, LOG_COLUMNS).encode())

    def write(self, **cells) -> None:
        row = {"seconds": f"{time.perf_counter() - self.started:.1f}", **cells}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The whole rows of a log.csv, every cell a string; a row that was cut off or is no row of ours is left out."""
        try:
            text = path.read_bytes().decode("utf-8", "replace").replace("\0", "?")
        except OSError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole, newline="")) if is_row(row)]


def is_understood(content: bytes, rows: list[dict]) -> bool:
    """Whether `rows` are all that a log.csv holds, but for a last row that was cut off."""
    text = as_csv(rows, LOG_COLUMNS).encode()
    return content.startswith(text) and not {10, 0} & set(content[len(text) :])


def is_row(row: dict) -> bool:
    """Whether a row has all columns of a log, with numbers in them or nothing."""
    try:
        numbers = [float(cell) for cell in row.values() if cell != ""]
        return tuple(row) == LOG_COLUMNS and len(numbers) >= 3 and int(row["step"]) >= 0 and int(row["epoch"]) >= 0
    except (TypeError, ValueError):
        return False
