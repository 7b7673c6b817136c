"""Exercise 2, the program: train, test and sample a denoising diffusion probabilistic model.

python ex2_main.py --epochs 50 --schedule cosine          train, then test, then draw the pictures
python ex2_main.py test --checkpoint results/DDPM         losses, bits per dimension, quality of samples (2.2 e)
python ex2_main.py sample --checkpoint results/DDPM       images of chosen classes (2.2 b, 2.4)
python ex2_main.py compare --vary schedule=linear,cosine  a run for every combination, side by side (2.2, 2.3, 2.4)
python ex2_main.py report                                 everything under results/ as one page
python ex2_main.py check DIR                              any solution of the exercise, judged by facts

Several GPUs: torchrun --standalone --nproc_per_node=gpu ex2_main.py ... runs the same commands in several processes.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import sys
from pathlib import Path

import torch

import ex2_config as cfg
import ex2_job as job
import ex2_viz as viz
from ex2_check import as_lines, check_solution
from ex2_checkpoint import load_checkpoint, note_command
from ex2_cli import PRESETS, check_scales, choose_classes, choose_scales, parse_args
from ex2_compare import grid_of_runs, is_judged, parse_vary, write_comparison, write_study
from ex2_data import DataSplits, InputError
from ex2_distributed import ProcessesError, connected, from_main, is_main, name_of_process, world_size
from ex2_evaluation import build_judge, evaluate, judge_samples, write_report
from ex2_fit import fit
from ex2_model import is_compiler_error
from ex2_pictures import GRID_IMAGES, draw_process, draw_samples, sample_and_save_images
from ex2_report import write_page
from ex2_training import RunError, test, train  # noqa: F401  the handed-out file has both loops, too

MAX_SAMPLES = 100_000  # of one `sample`: they are held in memory until they are written


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for input that can't be used, 1 for a fault while running."""
    job.take_any_text()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        timeout = args.given.get("timeout_minutes", cfg.Config.timeout_minutes)
        with job.handled_by(job.interrupt), connected(args.given.get("cuda"), timeout):
            COMMANDS[args.command](args)
    except InputError as error:
        # From a worker process that reads images the message comes with the worker's traceback before it.
        message = str(error).splitlines()[-1].replace("ex2_data.InputError: ", "")
        return failure(message, 2)
    except BrokenPipeError:
        sys.stdout = None  # nobody reads it any more
        return failure("nobody reads the output any more; a training that was going on is saved", job.BROKEN_PIPE)
    except (RunError, ProcessesError, OSError, FloatingPointError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        advice = "; free some space: the same command goes on from what is saved" if full else ""
        return failure(f"{error}{advice}")
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, so it comes first
        return failure("the GPU's memory is full: lower --batch_size or --dim")
    except RuntimeError as error:
        if is_compiler_error(error):
            reason = str(error).strip().splitlines()[0]
            return failure(f"--compile on: torch can't compile the network here ({reason}); give --compile auto or off")
        if "allocate memory" in str(error):
            return failure("the memory is full: lower --batch_size, --sample_batch or --dim")
        raise
    except job.Interrupted as stop:
        print(f"{stop}; a training that was going on is saved: the same command goes on with it", file=sys.stderr)
        return 128 + stop.number
    return 0


def failure(what: str, code: int = 1) -> int:
    """Says in one line what ended the program; returns the exit code."""
    print(f"{name_of_process()}error: {what}", file=sys.stderr)
    return code


def run_train(args) -> None:
    """`train`: fits the model, evaluates it and draws every picture of the exercise."""
    config, device = prepare_training(args)
    with job.locked(config.run_dir):
        splits = cfg.load_data(config)
        diffusor = cfg.build_diffusion(config, device)
        model = fit(config, splits, diffusor, device)
        note(config, args)
        write_report(evaluate(job.FittingModel(model), splits, diffusor, config), config)
        if is_main():
            model = for_sampling(model, config, device)
            draw_process(model, splits, diffusor, config)
            draw_samples(model, splits.class_names, diffusor, config)
    print(f"done: see {config.run_dir}/")


def run_compare(args) -> None:
    """`compare`: trains and judges runs of every combination of varied settings; finished ones are kept. 2.2 to 2.4.

    Raises RunError: a run failed; the others have their place in the table.
    """
    varied = parse_vary(args.vary)
    scales = check_scales(args)
    args.given.setdefault("run_name", f"compare-{'-'.join(varied)}")
    base, device = prepare_training(args)
    with job.locked(base.run_dir):
        splits = cfg.load_data(base)
        runs = grid_of_runs(base, varied, len(splits.class_names), args.seeds)
        if is_main():
            write_study(base.run_dir, varied, runs)
        note(base, args)
        judge = None
        if args.eval_samples > 0:
            judge = build_judge(splits, device, base, features_dir(base.run_dir), args.eval_samples)
        failed = {}
        for name, config in runs.items():
            print(f"--- {name}")
            try:
                train_and_judge(config, splits, judge, args.eval_samples, scales, device)
            except RunError as error:
                # Of several processes the others may not know of it; and a signal, where saving failed, ends all.
                if world_size() > 1 or isinstance(error.__context__, job.Interrupted):
                    raise
                failed[name] = str(error)
        if is_main():
            write_comparison(runs, varied, failed, base.run_dir, device)
    if failed:
        raise RunError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    print(f"done: see {base.run_dir}/")


def train_and_judge(config: cfg.Config, splits: DataSplits, judge, count: int, scales, device) -> None:
    """One run of a comparison; skips what an earlier call has done."""
    make_run_dir(config.run_dir)
    diffusor = cfg.build_diffusion(config, device)
    model = fit(config, splits, diffusor, device)
    if not from_main(lambda: is_judged(config, judge, count, scales), "the figures of an earlier call"):
        test_and_judge(judge, model, splits, diffusor, config, count, scales, weights="ema")


def prepare_training(args):
    """(config, device) for `train` and `compare`, with a run folder that can be written to."""
    # Not Config() with changes: what a setting is by default can depend on the data set.
    config = dataclasses.replace(PRESETS[args.preset], **args.given) if args.preset else cfg.Config(**args.given)
    device = job.pick_device(config.cuda, config.num_threads)
    job.computes_in_bfloat16(config.amp, device)  # refuses what this GPU can't
    make_run_dir(config.run_dir)
    return config, device


def run_test(args) -> None:
    """`test`: losses and bits per dimension of a checkpoint, and what its samples are worth: table, JSON and curves."""
    checkpoint, config, device = open_checkpoint(args)
    scales = choose_scales(args, config)
    splits = cfg.load_data(config)
    if splits.class_names != tuple(checkpoint["class_names"]):
        raise InputError(f"the data has classes {splits.class_names}, the checkpoint {checkpoint['class_names']}")
    make_run_dir(config.run_dir)
    model = cfg.restore_model(checkpoint, config, device, args.weights)
    diffusor = cfg.build_diffusion(config, device)
    judge = None
    if args.eval_samples > 0:
        folder = features_dir(run_dir_of(args.checkpoint))
        judge = build_judge(splits, device, config, folder, args.eval_samples, args.inception_weights)
    test_and_judge(judge, model, splits, diffusor, config, args.eval_samples, scales, args.weights)
    note(config, args)
    print(f"done: see {config.run_dir}/")


def test_and_judge(judge, model, splits, diffusor, config, count: int, scales, weights: str) -> None:
    """Losses and bound of a model, and, where there is a judge, the figures of `count` samples per guidance scale."""
    report = evaluate(job.FittingModel(model), splits, diffusor, config, weights)
    if judge is not None:
        model = for_sampling(model, config, diffusor.device)
        report["samples"] = judge_samples(
            judge, model, splits, diffusor, config, count=count, scales=scales, weights=weights
        )
    write_report(report, config)


def for_sampling(model, config: cfg.Config, device) -> job.FittingModel:
    """The model for drawing samples, in the precision of its training. Losses are always in float32."""
    return job.FittingModel(model, job.computes_in_bfloat16(config.amp, device))


def run_sample(args) -> None:
    """`sample`: images of chosen classes as single PNGs and as a grid."""
    checkpoint, config, device = open_checkpoint(args)
    if not 1 <= args.n_images <= MAX_SAMPLES:
        raise InputError(f"--n_images must be at least 1 and at most {MAX_SAMPLES}, got {args.n_images}")
    names = checkpoint["class_names"]
    chosen = choose_classes(args.classes, names, config)
    by_scale = [dataclasses.replace(config, guidance_scale=w) for w in args.scales or [config.guidance_scale]]
    count = 1 if config.dry_run else args.n_images
    out = config.run_dir if args.out else from_main(lambda: next_free(config.run_dir / "samples"), "the folder")
    if args.out and from_main(lambda: any(out.rglob("*.png")), "the folder"):
        raise InputError(f"--out: {out} holds images of an earlier call: empty it, or choose another folder")
    make_run_dir(out)
    diffusor = cfg.build_diffusion(config, device)
    model = for_sampling(cfg.restore_model(checkpoint, config, device, args.weights), config, device)
    classes = None if chosen is None else [chosen[i % len(chosen)] for i in range(count)]
    common = {"classes": classes, "class_names": names, "seed": config.seed, "batch_size": config.sample_batch}
    rows = []
    for scaled in by_scale:
        folder = out if len(by_scale) == 1 else out / f"w={scaled.guidance_scale:g}"
        images = sample_and_save_images(count, diffusor, model, device, folder, **common, **scaled.sampling)
        rows.append(images[:GRID_IMAGES].clone())  # so that the others need not be kept
    if len(by_scale) > 1 and is_main():
        columns = min(16, len(rows[0]))  # of each the same noise
        shown, scales = [names[c] for c in (classes or ())[:columns]], [f"w = {w:g}" for w in args.scales]
        viz.save_grid(torch.cat([row[:columns] for row in rows]), out / "guidance_grid.png", columns, scales, shown)
        scales = " ".join(f"{w:g}" for w in args.scales)
        print(f"their figures: python ex2_main.py test --checkpoint {args.checkpoint} --eval_scales {scales}")
    print(f"done: see {out}/")


def open_checkpoint(args):
    """(checkpoint, config, device) for `test` and `sample`, with the flags given now, and --out as run_dir."""
    checkpoint = from_main(lambda: load_checkpoint(args.checkpoint), "the checkpoint")
    out = Path(args.out or run_dir_of(args.checkpoint)).resolve()
    if not out.name:
        raise InputError(f"--out: {out} is no folder for pictures")
    now = {"cuda": None, "dry_run": False, "num_threads": None, **args.given}
    now.update(results_dir=str(out.parent), run_name=out.name)
    config = cfg.config_of(checkpoint, now)
    return checkpoint, config, job.pick_device(config.cuda, config.num_threads)


def run_dir_of(checkpoint: str) -> Path:
    """The folder of a run that was given as folder or as its checkpoint."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent


def features_dir(run_dir: Path) -> Path:
    """The folder of classifiers and features, shared by all runs beside `run_dir`."""
    return run_dir.resolve().parent / "features"


def next_free(folder: Path) -> Path:
    """The first of folder/001, folder/002, ... that is not there yet, so that no call mixes with an earlier one's."""
    return next(path for i in itertools.count(1) if not (path := folder / f"{i:03d}").exists())


def note(config: cfg.Config, args) -> None:
    """Adds the command to `commands.txt` of a run, once it has been accepted."""
    if is_main():
        note_command(config.run_dir, args.called)


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


def run_report(args) -> None:
    """`report`: everything under a results folder as one page, in the order of the sheet."""
    folder = Path(args.results_dir)
    if is_main():
        write_page(folder)
    print(f"done: see {folder / 'index.html'} and {folder / 'report.md'}")


def run_check(args) -> None:
    """`check`: a solution of the exercise in the skeleton's names, judged by facts. 2.1 to 2.4.

    Raises RunError: not all of it is right.
    """
    verdicts = check_solution(Path(args.folder), args.time_limit)
    print(json.dumps(verdicts, indent=2) if args.json else "\n".join(as_lines(verdicts)))
    wrong = sum(verdict["verdict"] not in ("right", "advice") for verdict in verdicts)
    if wrong:
        raise RunError(f"{wrong} of {len(verdicts)} facts are not right in {args.folder}")


COMMANDS = {
    "train": run_train,
    "test": run_test,
    "sample": run_sample,
    "compare": run_compare,
    "report": run_report,
    "check": run_check,
}

if __name__ == "__main__":
    sys.exit(main())
