"""Exercise 2, the program: train, test and sample a denoising diffusion probabilistic model.

python ex2_main.py --epochs 50 --schedule cosine          train, then test, then draw the pictures
python ex2_main.py test --checkpoint results/DDPM         losses, bits per dimension, quality of samples (2.2 e)
python ex2_main.py sample --checkpoint results/DDPM       images of chosen classes (2.2 b, 2.4)
python ex2_main.py compare --vary schedule=linear,cosine  a run for every combination, side by side (2.2, 2.3, 2.4)
python ex2_main.py export --checkpoint results/DDPM       the model in a page that samples, or as safetensors, ONNX
python ex2_main.py report                                 everything under results/ as one page
python ex2_main.py check DIR                              any solution of the exercise, checked against its equations

Several GPUs: torchrun --standalone --nproc_per_node=gpu ex2_main.py ... runs the same commands in several processes.
Each command imports what it needs when it runs, so that --help and a typing error don't wait for torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

from ex2.errors import InputError, exit_code_of
from ex2.settings.cli import check_scales, choose_classes, choose_scales, config_of_flags, parse_args, parse_vary
from ex2.settings.config import Config

HANDED_OUT = {"train": "ex2_train", "test": "ex2_train", "sample_and_save_images": "ex2.report.pictures"}
MAX_SAMPLES = 100_000  # of one `sample`: they are held in memory until they are written


def __getattr__(name: str):
    """`ex2_main.train`, `.test` and `.sample_and_save_images`, which the handed-out file holds too."""
    if name not in HANDED_OUT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HANDED_OUT[name]), name)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for input that can't be used, 1 for a fault while running."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not that of a notebook
            stream.reconfigure(errors="replace", line_buffering=True)  # "?" for what can't be encoded
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        if args.command in ("report", "check"):
            COMMANDS[args.command](args)
        else:
            if args.command in ("train", "compare"):
                config_of_flags(args)  # refuses a bad value before torch is loaded
            run_with_torch(args)
    except BaseException as error:
        code, message = exit_code_of(error)
        if code is None:
            raise
        print(message, file=sys.stderr)
        return code
    return 0


def run_with_torch(args) -> None:
    """Runs a command that may use a GPU and several processes, and that signals end in order."""
    from ex2.machine.job import handle_signals, interrupt, kill_workers
    from ex2.machine.processes import connect_processes

    timeout = args.given.get("timeout_minutes", Config.timeout_minutes)
    try:
        with handle_signals(interrupt), connect_processes(args.given.get("cuda"), timeout):
            COMMANDS[args.command](args)
    finally:
        kill_workers()


def run_train(args) -> None:
    """`train`: fits the model, evaluates it and draws every picture of the exercise."""
    from ex2.evaluation.evaluate import evaluate
    from ex2.evaluation.samples import inference_model
    from ex2.machine.job import lock_folder
    from ex2.machine.processes import is_main
    from ex2.report.metrics import write_metrics
    from ex2.report.pictures import draw_process, draw_samples
    from ex2.settings.build import build_diffusion, load_data
    from ex2.training.run import fit, open_run
    from ex2.training.start import prepare_training, record_command

    config, device = prepare_training(args)
    with lock_folder(config.run_dir):
        splits = load_data(config)
        diffusor = build_diffusion(config, device)
        run = open_run(config, splits, diffusor)
        record_command(config.run_dir, args)
        model = fit(run)
        write_metrics(evaluate(model, splits, diffusor, config), config)
        if is_main():
            model = inference_model(model, config, device)
            draw_process(model, splits, diffusor, config)
            draw_samples(model, splits.class_names, diffusor, config)
    print(f"done: see {config.run_dir}/")


def run_compare(args) -> None:
    """`compare`: trains and evaluates runs of every combination of varied settings. 2.2 to 2.4."""
    from ex2.evaluation.samples import build_evaluator
    from ex2.machine.job import lock_folder
    from ex2.report.study import grid_of_runs, run_study
    from ex2.settings.build import load_data
    from ex2.training.start import prepare_training, record_command

    varied, scales = parse_vary(args.vary), check_scales(args)
    args.given.setdefault("run_name", f"compare-{'-'.join(varied)}")
    base, device = prepare_training(args)
    with lock_folder(base.run_dir):
        runs = grid_of_runs(base, varied, args.seeds)  # refuses what can't be, before any data are read
        splits = load_data(base)
        record_command(base.run_dir, args)
        evaluator = build_evaluator(splits, device, base, base.run_dir, args.eval_samples, scales)
        run_study(base, varied, runs, splits, evaluator, device)
    print(f"done: see {base.run_dir}/")


def run_test(args) -> None:
    """`test`: losses and bits per dimension of a checkpoint, and what its samples are worth: table, JSON and curves."""
    from ex2.evaluation.evaluate import evaluate
    from ex2.evaluation.samples import build_evaluator
    from ex2.report.metrics import write_metrics
    from ex2.settings.build import build_diffusion, load_data, restore_model
    from ex2.training.log import RunLog
    from ex2.training.start import make_run_dir, open_checkpoint, record_command, run_dir_of

    checkpoint, config, device = open_checkpoint(args)
    scales, run_dir = choose_scales(args, config), run_dir_of(args.checkpoint)
    splits = load_data(config)
    if splits.class_names != tuple(checkpoint["class_names"]):
        raise InputError(f"the data has classes {splits.class_names}, the checkpoint {checkpoint['class_names']}")
    make_run_dir(config.run_dir)
    model = restore_model(checkpoint, config, device, args.weights)
    diffusor = build_diffusion(config, device)
    how = (run_dir, args.eval_samples, scales, args.inception_weights)
    evaluator = build_evaluator(splits, device, config, *how)
    record_command(config.run_dir, args)
    report = evaluate(model, splits, diffusor, config, evaluator, args.weights)
    write_metrics(report, config, RunLog.read(run_dir / "log.csv"))
    print(f"done: see {config.run_dir}/")


def run_sample(args) -> None:
    """`sample`: images of chosen classes as single PNGs and as a grid."""
    from ex2.evaluation.samples import inference_model
    from ex2.machine.processes import broadcast_from_main
    from ex2.report.pictures import sample_at_scales
    from ex2.settings.build import build_diffusion, restore_model
    from ex2.training.start import make_run_dir, next_free, open_checkpoint, open_start_image, record_command

    checkpoint, config, device = open_checkpoint(args)
    if not 1 <= args.n_images <= MAX_SAMPLES:
        raise InputError(f"--n_images must be at least 1 and at most {MAX_SAMPLES}, got {args.n_images}")
    names = checkpoint["class_names"]
    chosen = choose_classes(args.classes, names, config)
    scales = args.scales or [config.guidance_scale]
    for scale in scales:
        dataclasses.replace(config, guidance_scale=scale)  # refuses one that this model can't take
    count = 1 if config.dry_run else args.n_images
    out = config.run_dir if args.out else broadcast_from_main(lambda: next_free(config.run_dir / "samples"), "folder")
    if args.out and broadcast_from_main(lambda: any(out.rglob("*.png")), "folder"):
        raise InputError(f"--out: {out} holds images of an earlier call: empty it, or choose another folder")
    diffusor = build_diffusion(config, device)
    start = open_start_image(args, config, diffusor)
    make_run_dir(out)
    model = inference_model(restore_model(checkpoint, config, device, args.weights), config, device)
    record_command(out, args)
    classes = None if chosen is None else [chosen[i % len(chosen)] for i in range(count)]
    sample_at_scales(count, scales, diffusor, model, config, out, classes, names, start)
    if len(scales) > 1:
        given = " ".join(f"{w:g}" for w in scales)
        print(f"their metrics: python ex2_main.py test --checkpoint {args.checkpoint} --eval_scales {given}")
    print(f"done: see {out}/")


def run_export(args) -> None:
    """`export`: a checkpoint as a page that samples in the browser, as safetensors or as ONNX."""
    from ex2.live.export import export
    from ex2.machine.processes import is_main
    from ex2.settings.build import restore_model
    from ex2.training.start import make_run_dir, open_checkpoint, record_command

    if args.weights_as and args.format != "page":
        raise InputError(f"--weights_as is for --format page; {args.format} keeps float32")
    checkpoint, config, _ = open_checkpoint(args)
    if not is_main():
        return
    model = restore_model(checkpoint, config, "cpu", args.weights)
    make_run_dir(config.run_dir)
    record_command(config.run_dir, args)
    export(model, checkpoint, config, args.format, args.weights_as or "float16", args.called)


def run_report(args) -> None:
    """`report`: everything under a results folder as one page, in the order of the sheet."""
    from ex2.report.page import write_page

    folder = Path(args.results_dir)
    write_page(folder)
    print(f"done: see {folder / 'index.html'} and {folder / 'report.md'}")


def run_check(args) -> None:
    """`check`: solutions of the exercise in the skeleton's names, checked against its equations. 2.1 to 2.4."""
    from ex2.grading.run import check_submissions

    check_submissions(args)


COMMANDS = {
    "train": run_train,
    "test": run_test,
    "sample": run_sample,
    "compare": run_compare,
    "export": run_export,
    "report": run_report,
    "check": run_check,
}

if __name__ == "__main__":
    sys.exit(main())
