"""What a command does before its work: device, folders, checkpoint, and the note of what was called."""

from __future__ import annotations

import itertools
from pathlib import Path

from ex2.data.decode import read_image
from ex2.data.images import to_model_range
from ex2.errors import InputError
from ex2.machine.files import append_command
from ex2.machine.job import computes_in_bfloat16, pick_device
from ex2.machine.processes import broadcast_from_main, is_main
from ex2.settings.build import check_buildable
from ex2.settings.cli import config_of_flags
from ex2.settings.config import config_of
from ex2.training.checkpoint import load_checkpoint


def prepare_training(args):
    """(config, device) for `train` and `compare`, with a run folder that can be written to."""
    config = config_of_flags(args)
    check_buildable(config)
    device = pick_device(config.cuda, config.num_threads)
    computes_in_bfloat16(config.amp, device)  # refuses what this GPU can't
    make_run_dir(config.run_dir)
    return config, device


def open_checkpoint(args):
    """(checkpoint, config, device) for `test` and `sample`, with the flags given now, and --out as run_dir."""
    checkpoint = broadcast_from_main(lambda: load_checkpoint(args.checkpoint), "the checkpoint")
    out = Path(args.out or run_dir_of(args.checkpoint)).resolve()
    if not out.name:
        raise InputError(f"--out: {out} is no folder for pictures")
    now = {"cuda": None, "dry_run": False, "num_threads": None, **args.given}
    now.update(results_dir=str(out.parent), run_name=out.name)
    config = config_of(checkpoint, now)
    check_buildable(config)
    return checkpoint, config, pick_device(config.cuda, config.num_threads)


def open_start_image(args, config, diffusor) -> dict:
    """`start_image` and `start_fraction` of `Diffusion.sample_trajectory` by the flags of `sample`; {} without them."""
    if not args.start_image:
        if args.start_fraction is not None:
            raise InputError("--start_fraction says how far --start_image is noised: give both")
        return {}
    fraction, path = 0.6 if args.start_fraction is None else args.start_fraction, Path(args.start_image)
    if not 0 < fraction <= 1:
        raise InputError(f"--start_fraction must be above 0 and at most 1, got {fraction:g}")
    if not path.is_file():
        raise InputError(f"--start_image: there is no file {path}")
    try:
        diffusor.respace(config.sampling["steps"]).until(round(fraction * config.timesteps))
    except ValueError as error:
        raise InputError(f"--start_fraction {fraction:g} is too little: {error}") from error
    image = to_model_range(read_image(path, config.image_size, config.square))
    return {"start_image": image, "start_fraction": fraction}


def run_dir_of(checkpoint: str) -> Path:
    """The folder of a run that was given as folder or as its checkpoint."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent


def next_free(folder: Path) -> Path:
    """The first of folder/001, folder/002, ... that is not there yet, so that no call mixes with an earlier one's."""
    return next(path for i in itertools.count(1) if not (path := folder / f"{i:03d}").exists())


def record_command(folder: Path, args) -> None:
    """Adds the command to `commands.txt` of a folder, once it has been accepted and before its work begins."""
    if is_main():
        append_command(folder, args.called)


def make_run_dir(path: Path) -> None:
    """Creates the folder and sees that it can be written to; of several processes the first one does."""
    if not is_main():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").write_bytes(b"")
        (path / ".writable").unlink()
    except OSError as error:
        raise InputError(f"can't write to {path} ({error.strerror}): choose a folder you can write to") from error
