"""Exercise 2, the program: train, test and sample a denoising diffusion probabilistic model.

python ex2_main.py --epochs 50 --schedule cosine          train, then test, then draw the pictures
python ex2_main.py test --checkpoint results/DDPM         losses, bits per dimension, quality of samples (2.2 e)
python ex2_main.py sample --checkpoint results/DDPM       images of chosen classes (2.2 b, 2.4)
python ex2_main.py compare --vary schedule=linear,cosine  a run for every combination, side by side (2.2, 2.3, 2.4)
python ex2_main.py report                                 everything under results/ as one page

Several GPUs: torchrun --standalone --nproc_per_node=gpu ex2_main.py ... runs the same commands in several processes.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import re
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

import ex2_config as cfg
import ex2_job as job
import ex2_viz as viz
from ex2_checkpoint import load_checkpoint, write_atomically
from ex2_cli import parse_args
from ex2_compare import grid_of_runs, is_judged, parse_vary, write_comparison, write_study
from ex2_data import DataSplits, InputError
from ex2_diffusion import Diffusion, check_images, evenly_spaced
from ex2_distributed import (
    ProcessesError,
    connected,
    from_main,
    is_main,
    name_of_process,
    rank,
    shared_samples,
    world_size,
)
from ex2_evaluation import build_judge, evaluate, judge_samples, write_report
from ex2_loader import make_loader
from ex2_metrics import loss_over_timesteps
from ex2_model import Unet
from ex2_pictures import GUIDANCE_SCALES, draw_process, draw_samples
from ex2_report import write_page
from ex2_training import LossMeter, RunError, RunLog, TrainingState, draw_for

MAX_SAMPLES = 100_000  # of one `sample`: they are held in memory until they are written
GRID_IMAGES = 100  # at most, the first ones: thousands would take gigabytes to draw, and nobody could look at them


# ---------------------------------------------------------------------------- the commands


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for input that can't be used, 1 for a fault while running."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        timeout = args.given.get("timeout_minutes", cfg.Config.timeout_minutes)
        with job.handled_by(job.interrupt), connected(args.given.get("cuda"), timeout):
            COMMANDS[args.command](args)
    except InputError as error:
        # From a worker process that reads images the message comes with the worker's traceback before it.
        message = str(error).splitlines()[-1].replace("ex2_data.InputError: ", "")
        return failure(message, 2)
    except (RunError, ProcessesError, OSError, FloatingPointError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        advice = "; free some space: the same command goes on from what is saved" if full else ""
        return failure(f"{error}{advice}")
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, so it comes first
        return failure("the GPU's memory is full: lower --batch_size or --dim")
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            return failure(f"--compile: torch can't compile the network here ({reason}); drop the flag")
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
        model = job.FittingModel(fit(config, splits, diffusor, device))
        write_report(evaluate(model, splits, diffusor, config), config)
        if is_main():
            draw_process(model, splits, diffusor, config)
            draw_samples(model, splits.class_names, diffusor, config)
    print(f"done: see {config.run_dir}/")


def run_compare(args) -> None:
    """`compare`: trains and judges a run for every combination of varied settings; finished ones are kept. 2.3.

    Raises:
        RunError: a run failed; the others have their place in the table.
    """
    varied = parse_vary(args.vary)
    args.given.setdefault("run_name", f"compare-{'-'.join(varied)}")
    base, device = prepare_training(args)
    with job.locked(base.run_dir):
        splits = cfg.load_data(base)
        runs = grid_of_runs(base, varied, len(splits.class_names))
        if is_main():
            write_study(base.run_dir, varied, runs)
        judge = None
        if args.eval_samples > 0:
            judge = build_judge(splits, device, base, features_dir(base.run_dir), args.eval_samples)
        failed = {}
        for name, config in runs.items():
            print(f"--- {name}")
            try:
                train_and_judge(config, splits, judge, args.eval_samples, device)
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


def train_and_judge(config: cfg.Config, splits: DataSplits, judge, count: int, device) -> None:
    """One run of a comparison, as far as an earlier call didn't do it already."""
    make_run_dir(config.run_dir)
    diffusor = cfg.build_diffusion(config, device)
    model = job.FittingModel(fit(config, splits, diffusor, device))
    if not from_main(lambda: is_judged(config, judge, count), "the figures of an earlier call"):
        test_and_judge(judge, model, splits, diffusor, config, count, scales=[], weights="ema")


def prepare_training(args):
    """(config, device) for `train` and `compare`, with a run folder that can be written to."""
    # Not Config() with changes: what a setting is by default can depend on the data set.
    config = dataclasses.replace(cfg.PRESETS[args.preset], **args.given) if args.preset else cfg.Config(**args.given)
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
    model = job.FittingModel(cfg.restore_model(checkpoint, config, device, args.weights))
    diffusor = cfg.build_diffusion(config, device)
    judge = None
    if args.eval_samples > 0:
        folder = features_dir(run_dir_of(args.checkpoint))
        judge = build_judge(splits, device, config, folder, args.eval_samples, args.inception_weights)
    test_and_judge(judge, model, splits, diffusor, config, args.eval_samples, scales, args.weights)
    print(f"done: see {config.run_dir}/")


def test_and_judge(judge, model, splits, diffusor, config, count: int, scales, weights: str) -> None:
    """Losses and bound of a model, and, where there is a judge, the figures of `count` samples per guidance scale."""
    report = evaluate(model, splits, diffusor, config, weights)
    if judge is not None:
        report["samples"] = judge_samples(
            judge, model, splits, diffusor, config, count=count, scales=scales, weights=weights
        )
    write_report(report, config)


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
    make_run_dir(out)
    diffusor = cfg.build_diffusion(config, device)
    model = job.FittingModel(cfg.restore_model(checkpoint, config, device, args.weights))
    classes = None if chosen is None else [chosen[i % len(chosen)] for i in range(count)]
    common = {"classes": classes, "class_names": names, "seed": config.seed, "batch_size": config.sample_batch}
    rows = []
    for scaled in by_scale:
        folder = out if len(by_scale) == 1 else out / f"w={scaled.guidance_scale:g}"
        images = sample_and_save_images(count, diffusor, model, device, folder, **common, **scaled.sampling)
        rows.append(images[:GRID_IMAGES].clone())  # so that the others need not be kept
    if len(by_scale) > 1 and is_main():
        shown = [names[c] for c in (classes or ())[:GRID_IMAGES]]
        viz.save_guidance_grid(rows, args.scales, out / "guidance_grid.png", shown)
        scales = " ".join(f"{w:g}" for w in args.scales)
        print(f"their figures: python ex2_main.py test --checkpoint {args.checkpoint} --eval_scales {scales}")
    print(f"done: see {out}/")


def open_checkpoint(args):
    """(checkpoint, config, device) for `test` and `sample`, with the flags given now, and --out as run_dir."""
    checkpoint = from_main(lambda: load_checkpoint(args.checkpoint), "the checkpoint")
    out = Path(args.out or run_dir_of(args.checkpoint)).resolve()
    if not out.name:
        raise InputError(f"--out: {out} is no folder for pictures")
    now = {
        "cuda": None,
        "dry_run": False,
        "num_threads": None,
        **args.given,
        "results_dir": str(out.parent),
        "run_name": out.name,
    }
    config = cfg.config_of(checkpoint, now)
    return checkpoint, config, job.pick_device(config.cuda, config.num_threads)


def run_dir_of(checkpoint: str) -> Path:
    """The folder of a run that was given as folder or as its checkpoint."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent


def features_dir(run_dir: Path) -> Path:
    """Where all runs beside `run_dir` share what their samples are judged by."""
    return run_dir.resolve().parent / "features"


def next_free(folder: Path) -> Path:
    """The first of folder/001, folder/002, ... that is not there yet, so that no call mixes with an earlier one's."""
    return next(path for i in itertools.count(1) if not (path := folder / f"{i:03d}").exists())


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


def choose_classes(wanted: list[str] | None, names: list[str], config: cfg.Config) -> list[int] | None:
    """Labels for the names or numbers in `wanted`, all of them where it is None; None for an unconditional model."""
    if not config.class_free_guidance:
        if wanted:
            raise InputError("--classes: this model is unconditional; train one with --class_free_guidance")
        return None
    numbers = {**{str(i): i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
    for name in wanted or ():
        if name not in numbers:
            raise InputError(f"--classes: unknown class {name!r}; the model knows {', '.join(names)}")
    return [numbers[name] for name in wanted] if wanted else list(range(len(names)))


def choose_scales(args, config: cfg.Config) -> list[float]:
    """The guidance scales at which `test` judges samples; checks its other flags for them too."""
    if args.eval_samples < 0:
        raise InputError(f"--eval_samples must be at least 0, got {args.eval_samples}")
    if args.eval_samples == 0 and (args.eval_scales or args.inception_weights):
        raise InputError("--eval_scales and --inception_weights are for judged samples: drop --eval_samples 0")
    if not config.can_guide:
        if args.eval_scales:
            raise InputError("--eval_scales: this model can't be guided; train one with --class_free_guidance")
        return []
    for scale in args.eval_scales or ():
        if not -1000 <= scale <= 1000:
            raise InputError(f"--eval_scales must lie within -1000 .. 1000, got {scale:g}")
    return args.eval_scales or list(GUIDANCE_SCALES)


def run_report(args) -> None:
    """`report`: everything under a results folder as one page, in the order of the sheet."""
    folder = Path(args.results_dir)
    if is_main():
        write_page(folder)
    print(f"done: see {folder / 'index.html'} and {folder / 'report.md'}")


# ---------------------------------------------------------------------------- training


def fit(config: cfg.Config, splits: DataSplits, diffusor: Diffusion, device) -> Unet:
    """Trains to the end, or goes on from the run's checkpoint; returns the model with its averaged (EMA) weights.

    Raises:
        Interrupted: a signal came; what was trained is saved.
    """
    torch.manual_seed(config.seed)
    model = cfg.build_model(config, len(splits.class_names)).to(device)
    settings = {"flip": config.flip, "seed": config.seed, "num_workers": config.num_workers}
    part = (rank(), world_size())
    loader = make_loader(splits.train, config.batch_size, device, train=True, part=part, **settings)
    val_loader = make_loader(splits.val, config.batch_size * 2, device, num_workers=config.num_workers)
    epochs, steps_per_epoch = (1, 1) if config.dry_run else (config.epochs, len(loader))
    state = TrainingState(model, config, splits.class_names, epochs * steps_per_epoch, steps_per_epoch, device)
    state.resume()
    log = open_log(state)
    if not state.finished:
        announce(config, splits, model, diffusor, loader, state.total_steps - state.step)
        if config.save_model and is_main():
            job.check_space(config.run_dir, state.needed_space())
        state.save()  # a disk that is full shows now, and not after an epoch
        state.start()

    while not state.finished:
        try:
            epoch_loss = train_epoch(state, loader, diffusor, log)
            val = test(state.ema.module, val_loader, diffusor, device, config)
        except job.Interrupted:
            with job.signals_held():
                state.save()
            raise
        val_loss = sum(val[config.loss_type]) / len(val["t"])
        if not math.isfinite(val_loss):
            raise RunError(
                f"the weights are not finite after epoch {state.epochs_done + 1}; the last checkpoint is untouched"
            )
        if log is not None:
            log.write(step=state.step, epoch=state.epochs_done, epoch_loss=epoch_loss, val_loss=val_loss)
        print(
            f"epoch {state.epochs_done + 1}/{epochs}: train {epoch_loss:.4f}, val {val_loss:.4f} ({config.loss_type})"
        )
        state.end_epoch()
        state.save()
        if log is not None:
            viz.plot_training(log.rows(), config.run_dir / "training.png")
    state.drop_previous()
    return state.ema.module.eval()


def open_log(state: TrainingState) -> RunLog | None:
    """The run's log.csv, with config.json beside it; None for all processes but the first, which alone writes."""
    if not is_main():
        return None
    config = state.config
    settings_text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    write_atomically(config.run_dir / "config.json", settings_text.encode())
    return RunLog(config.run_dir / "log.csv", state.epochs_done + (state.time_spent >= 1), state.step)


def train_epoch(state: TrainingState, loader, diffusor: Diffusion, log: RunLog | None) -> float:
    """What is left of the current epoch; returns its loss. A signal waits for the end of the step.

    Raises:
        Interrupted: one came, to this or another process; the state is that after a whole step.
    """
    config = state.config
    loader.set_epoch(state.epochs_done, state.first_batch)
    with job.signals_held() as waiting:

        def after_step() -> bool:
            if number := state.count_step(waiting[0] if waiting else 0):
                raise job.Interrupted(number)
            state.save_if_due()
            return state.finished

        loss = train(
            state.network,
            loader,
            state.optimizer,
            diffusor,
            state.epochs_done,
            state.device,
            config,
            scheduler=state.scheduler,
            ema=state.ema,
            log=log,
            meter=state.meter,
            first_batch=state.first_batch,
            draw=lambda images: state.draw(images, diffusor.timesteps, loader.plan),
            after_step=after_step,
            loss_type=config.loss_type,
            grad_clip=config.grad_clip,
            min_snr=config.min_snr,
            amp=job.computes_in_bfloat16(config.amp, state.device),
        )
    if waiting:  # it came after the last step's count
        raise job.Interrupted(waiting[0])
    return loss


def train(
    model,
    trainloader,
    optimizer,
    diffusor,
    epoch,
    device,
    args,
    *,
    scheduler=None,
    ema=None,
    log=None,
    meter=None,
    first_batch=0,
    draw=None,
    after_step=None,
    loss_type="l2",
    grad_clip=1.0,
    min_snr=None,
    amp=False,
) -> float:
    """One epoch of Algorithm 1 of Ho et al. 2020; returns the mean loss over its images.

    Args:
        trainloader: yields (images (B, C, H, W) in [-1, 1], labels (B,)).
        args: has `log_interval` and `dry_run` (one batch only).
        scheduler, ema: stepped once per optimiser step.  log: a `RunLog`.
        meter, first_batch: the `LossMeter` and the number of batches that an interrupted epoch has behind it.
        draw: images -> `Draw`, the times and noise of a step; None draws them from torch's global generator.
        after_step: called without arguments after every optimiser step; the epoch ends early where it returns True.
        loss_type, min_snr: as in `Diffusion.p_losses`.  grad_clip: largest norm of the gradient.  amp: autocast to
            bfloat16.

    Raises:
        RunError: the loss is no longer finite.
    """
    device = torch.device(device)
    unet = getattr(model, "module", model)  # where several processes share gradients, DDP holds it
    conditional = getattr(unet, "class_free_guidance", False)
    model.train()
    meter = LossMeter(epoch) if meter is None else meter
    whole = {"total": len(trainloader), "initial": first_batch}
    progress = tqdm(trainloader, f"epoch {epoch + 1}", disable=args.dry_run or None, **whole)
    parameters = list(model.parameters())

    def close_window(step: int) -> None:
        train_loss, grad_norm = meter.close_window()
        progress.set_postfix(loss=f"{train_loss:.4f}")
        if progress.disable and not args.dry_run:  # no terminal, as in a batch job: lines instead of a bar
            print(f"epoch {epoch + 1}, step {step + 1}/{len(trainloader)}: loss {train_loss:.4f}")
        if log is not None:
            figures = {"lr": lr, "grad_norm": grad_norm, "train_loss": train_loss}
            log.write(step=epoch * len(trainloader) + step + 1, epoch=epoch, **figures)

    for step, (images, labels) in enumerate(progress, first_batch):
        images, labels = images.to(device), labels.to(device)
        if step == first_batch:
            check_images(images.cpu())
        drawn = draw(images) if draw else draw_for(images, diffusor.timesteps)
        classes = labels if conditional else None
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = diffusor.p_losses(model, images, drawn.t, drawn.noise, loss_type, classes, min_snr)
        loss = loss * drawn.weight
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if ema is not None:
            ema.update_parameters(model)
        meter.add(loss.detach(), norm, drawn.batch_size, lr)
        last = args.dry_run or step + 1 == len(trainloader)
        if last or len(meter.window) == args.log_interval:
            close_window(step)
        ended = after_step is not None and after_step()
        if last or ended:
            break
    if meter.window:
        close_window(step)
    return meter.mean


def test(model, testloader, diffusor, device, args) -> dict:
    """2.2 e: l1 and l2 loss at fixed times with fixed noise, without label dropout; see `loss_over_timesteps`.

    Args:
        args: `eval_timesteps` and `eval_images` bound the work where it has them; `dry_run` takes one image.
    """
    training = model.training
    model.eval()
    times = evenly_spaced(diffusor.timesteps, getattr(args, "eval_timesteps", 10))
    max_images = 1 if args.dry_run else getattr(args, "eval_images", None)
    losses = loss_over_timesteps(model, testloader, diffusor, times, max_images=max_images)
    model.train(training)
    return losses


def announce(config: cfg.Config, splits: DataSplits, model, diffusor: Diffusion, loader, steps: int) -> None:
    """Says what is about to happen, how many steps it takes and about how long, from steps timed on a copy."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.run_name}: {config.dataset} at {config.image_size}x{config.image_size}, "
        f"{len(splits.train)} training, {len(splits.val)} validation and {len(splits.test)} test images, "
        f"{len(splits.class_names)} classes"
    )
    precision = "bfloat16 where it is safe" if job.computes_in_bfloat16(config.amp, diffusor.device) else "float32"
    print(
        f"U-Net with {parameters:,} parameters on {diffusor.device} in {precision}, "
        f"{config.schedule} schedule with {config.timesteps} timesteps"
    )
    if config.dry_run:
        return
    loader.set_epoch(0)
    seconds = seconds_per_step(config, model, diffusor, loader)
    minutes = steps * seconds / 60
    limit = (
        f", of which --max_minutes {config.max_minutes:g} leaves room for a part"
        if 0 < (config.max_minutes or 0) < minutes
        else ""
    )
    print(
        f"{steps} optimiser steps of {config.batch_size} images: about {minutes:.1f} min at {seconds:.3f} s each{limit}"
    )


def seconds_per_step(config: cfg.Config, model, diffusor: Diffusion, loader) -> float:
    """Median time of an optimiser step, measured on a copy of the model; leaves the random state as it was.

    Raises:
        RunError: the batch doesn't fit the GPU's memory; says which would.
    """
    times, batches = [], [batch for _, batch in zip(range(5), loader)]
    trial = TrainingState(deepcopy(model), config, (), total_steps=10, steps_per_epoch=10, device=diffusor.device)
    with torch.random.fork_rng(devices=[diffusor.device] if diffusor.device.type == "cuda" else []):
        try:
            for batch in batches:
                start = time.perf_counter()
                try_step(trial, diffusor, batch)
                times.append(time.perf_counter() - start)
        except torch.cuda.OutOfMemoryError:
            fits = None
        else:
            return sorted(times)[len(times) // 2]
        images, labels = batches[0]
        fits = job.batch_that_fits(lambda n: try_step(trial, diffusor, (images[:n], labels[:n])), len(images))
    advice = f"--batch_size {fits * world_size()} fits" if fits else "not even one image does"
    size = len(images) * world_size()
    raise RunError(f"--batch_size {size} doesn't fit the GPU's free memory; {advice}, as would a lower --dim")


def try_step(trial: TrainingState, diffusor: Diffusion, batch) -> None:
    """One optimiser step of a training that comes to nothing."""
    quiet, device = dataclasses.replace(trial.config, dry_run=True), trial.device
    amp = job.computes_in_bfloat16(trial.config.amp, device)
    train(trial.model, [batch], trial.optimizer, diffusor, 0, device, quiet, ema=trial.ema, amp=amp)


# ---------------------------------------------------------------------------- sampling


def sample_and_save_images(
    n_images,
    diffusor,
    model,
    device,
    store_path,
    *,
    classes=None,
    class_names=None,
    seed=0,
    batch_size=100,
    **sampling,
) -> torch.Tensor:
    """Samples images and saves them one by one, the first as `grid.png` too; returns (n_images, C, H, W) on the CPU.

    Each process samples its share; the first one saves.

    Args:
        classes: a label per image, for a conditional model.  class_names: their names, for file names and the grid.
        sampling: `guidance_scale`, `sampler`, `steps` and `eta` as in `Diffusion.sample`.
    """
    store_path = Path(store_path)
    training = model.training
    model.to(device).eval()
    classes = None if classes is None else torch.as_tensor(classes)
    images = shared_samples(diffusor, model, n_images, batch_size, seed, classes=classes, **sampling)
    model.train(training)
    if not is_main():
        return images
    store_path.mkdir(parents=True, exist_ok=True)
    labels = [] if classes is None else [class_names[c] if class_names else str(c) for c in classes.tolist()]
    suffixes = [re.sub(r"[^\w.-]+", "_", f"_{label}") for label in labels] or [""] * n_images
    viz.save_images(images, [store_path / f"{i:04d}{suffix}.png" for i, suffix in enumerate(suffixes)])
    viz.save_grid(images[:GRID_IMAGES], store_path / "grid.png", labels=labels[:GRID_IMAGES])
    return images


COMMANDS = {"train": run_train, "test": run_test, "sample": run_sample, "compare": run_compare, "report": run_report}

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in a batch job's log, too, lines appear when they are printed
    sys.exit(main())
