"""Checkpoints that a kill, a full disk or a flipped bit can't spoil unnoticed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from pathlib import Path

import torch

from ex2.errors import InputError
from ex2.machine.files import write_atomically

CHECKPOINT_FORMAT = 3
CHECKPOINT_NAME = "ckpt.pt"
PREVIOUS = ".previous"  # ending of the checkpoint before the newest
CONTENT = {  # of the checkpoint of a run, and the types of it
    "config": dict, "class_names": list, "data": dict, "model": dict, "ema": dict, "optimizer": dict, "meter": dict,
    "epoch": int, "step": int, "processes": int, "seconds": float,
}  # fmt: skip
METER = {"steps": int, "images": int, "total": float, "window": list}


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
    *newer, oldest = (checkpoints_in(path) or [path / CHECKPOINT_NAME]) if path.is_dir() else [path]
    for candidate in newer:
        try:
            return check_content(read_checkpoint(candidate, device), candidate)
        except InputError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return check_content(read_checkpoint(oldest, device), oldest)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint files of a run, the newest first. One whose writing was cut off is none."""
    newest = folder / CHECKPOINT_NAME
    candidates = [newest.with_name(newest.name + suffix) for suffix in (".new", "", PREVIOUS)]
    return [candidate for candidate in candidates if candidate.is_file()]


def check_content(content: dict, path: Path) -> dict:
    """The content of a run's checkpoint; an InputError unless all of it is of the kind that `Training.save` writes."""
    content.setdefault("data", {})  # not kept before 2026-11-28
    wrong = [name for name, kind in CONTENT.items() if not isinstance(content.get(name), kind)]
    if not wrong:
        model, ema, optimizer, meter = (content[name] for name in ("model", "ema", "optimizer", "meter"))
        weights = [[(name, getattr(value, "shape", None)) for name, value in part.items()] for part in (model, ema)]
        states, groups = optimizer.get("state"), optimizer.get("param_groups")
        fits = {
            "class_names": all(isinstance(name, str) for name in content["class_names"]),
            "data": list(content["data"]) in ([], ["train", "val", "test"])
            and all(isinstance(part, str) for part in content["data"].values()),
            "epoch": content["epoch"] >= 0,
            "step": content["step"] >= 0,
            "processes": content["processes"] >= 1,
            "seconds": 0 <= content["seconds"] < float("inf"),
            "model": all(isinstance(value, torch.Tensor) for value in (*model.values(), *ema.values())),
            "ema": weights[0] == weights[1],
            "optimizer": isinstance(states, dict)
            and isinstance(groups, list)
            and len(groups) == 1
            and isinstance(groups[0].get("lr"), float)
            and all(isinstance(state, dict) for state in states.values())
            and all(isinstance(value, torch.Tensor) for state in states.values() for value in state.values()),
            "meter": all(isinstance(meter.get(name), kind) for name, kind in METER.items())
            and all(isinstance(step, (list, tuple)) and len(step) == 3 for step in meter["window"])
            and min(meter["steps"], meter["images"]) >= 0
            and 0 <= meter["total"] < float("inf"),
        }
        wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise InputError(f"{path} is no checkpoint of a run of this program: {', '.join(wrong)} is not what it writes")
    return content


def read_checkpoint(path: Path, device="cpu") -> dict:
    """The content of one checkpoint file; errors as in `load_checkpoint`."""
    if not path.is_file():
        run = Path("results") / (path.parent if path.name == CHECKPOINT_NAME else path)
        near = f"did you mean {run}?" if run.is_dir() else "give --checkpoint a run's folder, or train first"
        raise InputError(f"no checkpoint at {path}: {near}")
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
