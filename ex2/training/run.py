"""A training run from start to end: `fit` goes on from a checkpoint, ends in order on a signal or when the time is up,
keeps a log, and shares the work with other processes. The loop is `ex2_train.train`, the step `ex2_train.train_step`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ex2.data.images import DataSplits, fingerprint_of
from ex2.data.loader import make_loader
from ex2.errors import InputError, Interrupted, ReadingError, RunError, is_compiler_error
from ex2.machine.compiling import compile_blocks
from ex2.machine.cuda_graphs import GraphReplay
from ex2.machine.files import write_json
from ex2.machine.job import batch_that_fits, check_space, computes_in_bfloat16, hold_signals
from ex2.machine.processes import all_reduce_max, broadcast_from_main, is_main, is_restart, rank, world_size
from ex2.meter import LossMeter
from ex2.optimisation import EMA, build_optimizer, learning_rate, set_learning_rate
from ex2.settings.build import build_model
from ex2.settings.config import TRAINING_GROUPS, Config, config_of
from ex2.training.checkpoint import CHECKPOINT_NAME, PREVIOUS, checkpoints_in, load_checkpoint, save_checkpoint
from ex2.training.log import RunLog
from ex2_diffusion import Diffusion
from ex2_model import Unet
from ex2_train import Rows, test, train, train_step
from ex2_viz import plot_training

ETA_STEPS = {"cpu": (2, 6), "cuda": (10, 30)}  # steps of a call between which their time is taken; a GPU replays then
MINUTES_WORTH_COMPILING = 10  # of training left. On an H200 compiling took 112 s and made a step 1.65 times as fast


def fit(run: Training) -> Unet:
    """Trains to the end; returns the model with its EMA weights.

    Raises:
        Interrupted: a signal came; what was trained is saved.
        RunError: the loss or the weights are not finite, or a batch doesn't fit the GPU.
    """
    if not run.finished:
        run.start()
    hooks = {"take_step": run.take_step, "after_step": run.after_step}
    try:
        while not run.finished:
            loop = (run.network, run.loader, run.optimizer, run.diffusor, run.epochs_done, run.device, run.config)
            with run.epoch():
                loss = train(*loop, meter=run.meter, **hooks)
            val = test(run.ema.model, run.val_loader, run.diffusor, run.device, run.config)
            run.end_epoch(loss, sum(val[run.config.loss_type]) / len(val["t"]))
    except (Interrupted, BrokenPipeError, ReadingError):  # a signal; nobody reads what is printed; no images come
        if run.is_whole:
            with hold_signals():
                run.save()
        raise
    finally:
        run.step_function = None  # and with it the memory of its CUDA graphs
    run.drop_previous()
    return run.ema.model.eval()


def open_run(config: Config, splits: DataSplits, diffusor: Diffusion) -> Training:
    """The training of a run, new or as its checkpoint has it.

    Raises InputError: the checkpoint was trained with other settings or on other classes.
    """
    torch.manual_seed(config.seed)
    device, workers = diffusor.device, config.num_workers
    model = build_model(config, len(splits.class_names)).to(device)
    how = {"train": True, "flip": config.flip, "seed": config.seed, "part": (rank(), world_size())}
    loader = make_loader(splits.train, config.batch_size, device, num_workers=workers, **how)
    val_loader = make_loader(splits.val, config.batch_size * 2, device, num_workers=workers)
    run = Training(model, config, diffusor, loader, splits.class_names, val_loader)
    run.data = broadcast_from_main(lambda: fingerprint_of(splits), "the fingerprint of the data")
    run.resume()
    run.open_log()
    if not run.finished:
        announce(config, splits, model, diffusor, run.total_steps - run.step)
    return run


def announce(config: Config, splits: DataSplits, model, diffusor: Diffusion, steps: int) -> None:
    """Says what is about to be trained, on what, how and how long."""
    size, precision = f"{config.image_size}x{config.image_size}", "float32"
    if computes_in_bfloat16(config.amp, diffusor.device):
        precision = "bfloat16 where it is safe"
    print(
        f"{config.run_name}: {config.dataset} at {size}, {len(splits.train)} training, {len(splits.val)} validation, "
        f"{len(splits.test)} test images, {len(splits.class_names)} classes\n"
        f"U-Net with {sum(p.numel() for p in model.parameters()):,} parameters on {diffusor.device} in {precision}, "
        f"{config.schedule} schedule with {config.timesteps} timesteps\n"
        f"{steps} optimiser steps of {config.batch_size} images; how long they take is said after the first few"
    )


class Training:
    """A run while it trains: all that its steps change, and how far it is.

    Several processes hold it all, and change it alike; the first one alone writes.

    Attributes:
        model: the U-Net, whose weights are saved.
        network: what is called: the U-Net, or DDP around it.
        step: optimiser steps that are done.
        epochs_done: epochs that are over, their validation included.
        seconds: of training as of the last step, in all calls of the program.
        meter: losses of the epoch going on.
    """

    def __init__(self, model: Unet, config: Config, diffusor: Diffusion, loader, class_names, val_loader=()):
        self.model = self.network = model
        self.config, self.diffusor, self.loader, self.val_loader = config, diffusor, loader, val_loader
        self.device = diffusor.device
        self.settings = {name: getattr(config, name) for name in ("loss_type", "grad_clip", "min_snr")}
        self.settings["amp"] = computes_in_bfloat16(config.amp, self.device)
        self.class_names, self.data = list(class_names), {}  # data: see `fingerprint_of`
        self.epochs, self.steps_per_epoch = (1, 1) if config.dry_run else (config.epochs, len(loader))
        self.total_steps = self.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(model, config.lr, config.adam_beta1)
        self.ema = EMA(model, config.ema_images, config.batch_size)
        self.log = None  # the first process has one
        self.in_step = False
        self.step, self.epochs_done, self.seconds, self.lr = 0, 0, 0.0, config.lr
        self.signals: list[int] = []  # that came during the epoch, see `hold_signals`
        self.start_epoch()
        self.started = self.saved_at = time.monotonic()
        self.step_function = self.eager_step  # or its replay
        self.steps_this_call, self.eta_from = 0, 0.0  # steps of this call, and when its time began to be taken

    @property
    def batches_done(self) -> int:
        """How many batches of the current epoch are done."""
        return self.step - self.epochs_done * self.steps_per_epoch

    @property
    def is_whole(self) -> bool:
        """Whether the last step is done and its loss taken in. In between, a second Ctrl-C must not save it."""
        return not self.in_step and self.meter.all_steps == self.batches_done

    @property
    def time_fraction(self) -> float:
        """Fraction of `max_minutes` that training has taken; 0 without such a limit."""
        return self.seconds / 60 / self.config.max_minutes if self.config.max_minutes else 0.0

    @property
    def finished(self) -> bool:
        """Whether every epoch is done, or the time is up."""
        return self.step >= self.total_steps and self.batches_done == 0 or self.time_fraction >= 1

    # ------------------------------------------------------------------------ training

    def start(self) -> None:
        """Saves for the first time, connects the processes, and starts the clock."""
        if self.config.save_model and is_main():
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            # Three checkpoints while one is being replaced, each of weights, EMA and two moments; and pictures.
            check_space(self.config.run_dir, 3 * 4 * weights + 20_000_000)
        self.save()  # a disk that is full shows now, and not after an epoch
        self.started = time.monotonic() - self.seconds
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, devices, gradient_as_bucket_view=True)
        self.build_step_function(compiled=self.config.compile == "on")

    def build_step_function(self, compiled: bool) -> None:
        """Chooses the fastest step for this device: replayed on a GPU, with a compiled network if `compiled`."""
        if compiled or self.model.compiled:
            rows, _ = self.loader.plan.own_rows(0)
            compile_blocks(self.model, rows.stop - rows.start if compiled else 0)
        self.step_function = self.eager_step
        if uses_cuda_graphs(self.config, self.device):
            self.step_function = GraphReplay(self.eager_step, self.step_state, "the training step")

    def start_epoch(self) -> None:
        """A new sum of losses."""
        self.meter = LossMeter(self.epochs_done, self.loader.plan.images_in, self.log_window)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Around the rest of the current epoch: a signal waits for the end of a step.

        Raises `Interrupted` where one came, to this or another process; the state is that after a whole step.
        """
        self.loader.set_epoch(self.epochs_done, self.batches_done)
        with hold_signals() as self.signals:
            try:
                yield
            except ReadingError:  # a signal to the whole group can end a worker that has just been started
                if not self.signals:
                    raise
        if self.signals:  # it came after the last step
            raise Interrupted(self.signals[0])

    def after_step(self) -> bool:
        """Acts on signals, saves from time to time; returns whether the epoch ends, as the time is up."""
        now = time.monotonic() - self.started
        number, self.seconds = all_reduce_max(self.signals[0] if self.signals else 0, now)
        if number:
            raise Interrupted(number)
        if time.monotonic() - self.saved_at > 60 * self.config.save_minutes:
            self.save()
        return self.finished

    def take_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`train_step` with the settings of the run; a `RunError` says which batch would fit the memory."""
        rows, self.in_step = self.prepare_step(), True
        try:
            result = self.step_function(images, labels, **({} if rows is None else {"rows": rows}))
        except torch.cuda.OutOfMemoryError:
            result = None  # only after this block the failed step's tensors are gone
        except Exception as error:
            if self.config.compile == "on" or not is_compiler_error(error):
                raise
            print(f"torch can't compile the network here ({str(error).strip().splitlines()[0]}): going on without")
            self.build_step_function(compiled=False)
            return self.take_step(images, labels)
        if result is None:
            raise self.too_large(images, labels)
        self.step += 1
        self.in_step = False
        self.report_eta()
        return result

    def prepare_step(self) -> Rows | None:
        """Sets what changes from step to step: random numbers, learning rate, EMA weight.

        The random numbers depend on the seed and the step alone, so a resumed run draws what an uninterrupted one does.
        Returns this process's rows of the batch; None where there is one process.
        """
        shared, *own = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1 + world_size()).tolist()
        torch.manual_seed(shared)
        config = self.config
        self.lr = learning_rate(config.lr, self.step, self.total_steps, config.warmup_steps, self.time_fraction)
        set_learning_rate(self.optimizer, self.lr)
        self.ema.set_step(self.step)
        if world_size() == 1:
            return None
        batch, plan = self.batches_done, self.loader.plan
        return Rows(plan.images_in(batch), *plan.own_rows(batch), own[rank()])

    @property
    def eager_step(self) -> Callable:
        """(images, labels) -> (loss, gradient norm): `train_step` with the settings of the run, without CUDA graph."""
        return partial(train_step, self.network, self.optimizer, self.diffusor, ema=self.ema, **self.settings)

    def step_state(self) -> dict[str, list]:
        """The tensors that a step changes."""
        moments = {}
        for state in self.optimizer.state.values():
            for name, value in state.items():
                moments.setdefault(name, []).append(value)
        return {"weights": list(self.model.parameters()), "EMA": self.ema.weights, **moments}

    def too_large(self, images: Tensor, labels: Tensor) -> RunError:
        """The error that names a batch which fits the GPU's memory. The search for it spoils the weights."""
        # Without the memory of a CUDA graph, and without the other processes, which don't search.
        self.step_function, self.network, size = None, self.model, len(images)
        fits = batch_that_fits(lambda n: self.eager_step(images[:n], labels[:n]), size)
        advice = f"--batch_size {fits * world_size()} fits" if fits else "not even one image does"
        size *= world_size()
        return RunError(f"--batch_size {size} doesn't fit the GPU's free memory; {advice}, as would a lower --dim")

    def report_eta(self) -> None:
        """After a few steps: says how many are left and how long they take."""
        self.steps_this_call += 1
        first, last = ETA_STEPS[self.device.type]
        if self.steps_this_call not in (first, last) or self.config.dry_run:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.steps_this_call == first:
            self.eta_from = time.monotonic()
            return
        seconds = (time.monotonic() - self.eta_from) / (last - first)
        steps, limit = self.total_steps - self.step, self.config.max_minutes
        minutes, size = steps * seconds / 60, self.config.batch_size
        part = f", of which --max_minutes {limit:g} leaves room for a part" if limit and limit < minutes else ""
        print(f"{steps} steps of {size} images are left: about {minutes:.1f} min at {seconds:.3f} s each{part}")
        self.maybe_compile(min(minutes, limit or minutes))

    def maybe_compile(self, minutes: float) -> None:
        """Compiles the network if that pays off in the `minutes` left; all processes do as the slowest one says."""
        if self.device.type != "cuda" or self.config.compile != "auto":
            return
        if all_reduce_max(0, minutes)[1] > MINUTES_WORTH_COMPILING:
            print("compiling the network: one to two minutes of waiting, then faster (--compile off does without)")
            self.build_step_function(compiled=True)

    def log_window(self, loss: float, grad_norm: float) -> None:
        """A row of log.csv for the steps since the last one."""
        if self.log is not None:
            self.log.write(step=self.step, epoch=self.epochs_done, lr=self.lr, grad_norm=grad_norm, train_loss=loss)

    def end_epoch(self, loss: float, val_loss: float) -> None:
        """Prints, logs and saves the end of an epoch, or of the part of it for which there was time."""
        number = self.epochs_done + 1
        if not math.isfinite(val_loss):
            raise RunError(f"the weights are not finite after epoch {number}; the last checkpoint is untouched")
        print(f"epoch {number}/{self.epochs}: train {loss:.4f}, val {val_loss:.4f} ({self.config.loss_type})")
        if self.log is not None:
            self.log.write(step=self.step, epoch=self.epochs_done, epoch_loss=loss, val_loss=val_loss)
        if self.batches_done == self.steps_per_epoch:
            self.epochs_done += 1
            self.start_epoch()
        self.save()
        if self.log is not None:
            plot_training(RunLog.read(self.log.path), self.config.run_dir / "training.png")

    # ------------------------------------------------------------------------ saving and resuming

    def open_log(self) -> None:
        """Opens log.csv and writes config.json beside it; in the first process alone."""
        if not is_main():
            return
        folder = self.config.run_dir
        write_json(folder / "config.json", dataclasses.asdict(self.config))
        logged = self.step - len(self.meter.window)  # the steps after it will be written again
        self.log = RunLog(folder / "log.csv", self.epochs_done + (self.time_fraction >= 1), logged)

    def save(self) -> None:
        """Writes the run's checkpoint, unless a loss is not finite: `restore_model` makes a model of it."""
        if not self.config.save_model or not is_main():
            return
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self.lr
        weights = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": optimizer}
        progress = {"epoch": self.epochs_done, "step": self.step, "seconds": self.seconds, "processes": world_size()}
        run = {"config": dataclasses.asdict(self.config), "class_names": self.class_names, "data": self.data}
        path = self.config.run_dir / CHECKPOINT_NAME
        save_checkpoint(path, **run, **weights, **progress, meter=self.meter.state_dict(self.lr))
        self.saved_at = time.monotonic()

    def drop_previous(self) -> None:
        """Removes the checkpoint before the newest. A finished run does not need it, and pools have small quotas."""
        path = self.config.run_dir / CHECKPOINT_NAME
        if is_main() and path.is_file():
            path.with_name(path.name + PREVIOUS).unlink(missing_ok=True)

    def resume(self) -> None:
        """Continues from the checkpoint of an earlier run of the same name, if there is one and `resume` allows it.

        All settings are those of now, from the first step on; only weights, moments and counts are taken.

        Raises:
            InputError: it has other settings or other classes, or `resume` requires a checkpoint and there is none.
        """
        config, other = self.config, "choose another --run_name"
        saved = broadcast_from_main(self.find_checkpoint, "the checkpoint")
        if saved is None:
            return
        changed = differences(training_settings(config_of(saved, {})), training_settings(config))
        there, now = (", ".join(names) for names in (saved["class_names"], self.class_names))
        classes, data = f"{there} there, {now} now" if there != now else "", differences(saved["data"], self.data)
        for what, change, allowed in (("settings", changed, True), ("classes", classes, False), ("data", data, True)):
            if change and not (allowed and config.allow_changes):
                advice = f"{other}, or go on with the new ones by --allow_changes" if allowed else other
                raise InputError(f"{config.run_dir} holds a run with other {what} ({change}): {advice}")
        self.load_weights(saved)
        self.epochs_done, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.start_epoch()
        if changed:
            print(f"{config.run_dir}: going on with other settings ({changed}), from the start of the epoch")
            self.step = self.epochs_done * self.steps_per_epoch
        else:
            self.meter.load_state_dict(saved["meter"])
        fits = changed or self.meter.all_steps == self.batches_done
        if not fits or not 0 <= self.batches_done <= self.steps_per_epoch:
            raise InputError(f"{config.run_dir} holds a run on other images: {other}")
        if (there := saved["processes"]) != world_size():
            print(f"{there} processes there, {world_size()} now: a step still takes {config.batch_size} images in all")
        done = f"{self.step} of {self.total_steps} steps ({self.epochs_done} of {config.epochs} epochs)"
        print(f"{config.run_dir}: {done} are done, going on from there")

    def find_checkpoint(self) -> dict | None:
        """The checkpoint to continue from; None to start anew. A run that lost a process always continues."""
        config = self.config
        there = bool(checkpoints_in(config.run_dir))
        if there and not config.save_model and not config.dry_run:
            what = f"--no_save_model: the checkpoint in {config.run_dir} would no longer fit the log beside it"
            raise InputError(f"{what}: choose another --run_name")
        if config.resume and not there:
            raise InputError(f"--resume: no checkpoint in {config.run_dir}; drop the flag to start a new run")
        anew = config.resume is False and not is_restart()
        return load_checkpoint(config.run_dir) if there and not anew and not config.dry_run else None

    def load_weights(self, saved: dict) -> None:
        """Loads weights, EMA and moments of a checkpoint; an `InputError` if they are of another size."""
        try:
            self.model.load_state_dict(saved["model"])
            self.ema.model.load_state_dict(saved["ema"])
        except RuntimeError as error:
            what = f"the weights in {self.config.run_dir} don't fit the model's settings"
            raise InputError(f"{what}: choose another --run_name") from error
        shapes = [list(weight.shape) for weight in self.model.parameters()]
        moments = [list(state["exp_avg"].shape) for state in saved["optimizer"]["state"].values() if "exp_avg" in state]
        if moments not in ([], shapes):
            raise InputError(f"the moments in {self.config.run_dir} don't fit its weights: choose another --run_name")
        own = self.optimizer.state_dict()["param_groups"]  # betas and kind are those of this run
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": own})
        self.lr = saved["optimizer"]["param_groups"][0]["lr"]  # until the next step
        set_learning_rate(self.optimizer, self.lr)


def uses_cuda_graphs(config: Config, device: torch.device) -> bool:
    """Whether the training step is captured and replayed: on one GPU, where there is more than a single step."""
    return device.type == "cuda" and world_size() == 1 and not config.dry_run


def training_settings(config: Config) -> dict:
    """The flags of a training, by which its weights are what they are."""
    fields = [f for f in dataclasses.fields(config) if f.metadata["group"] in TRAINING_GROUPS or f.name == "seed"]
    return {f"--{f.name}": getattr(config, f.name) for f in fields}


def differences(before: dict, now: dict) -> str:
    """In what two dicts differ, with both values; "" where in nothing, or where one of them is not known."""
    changed = [name for name in before if name in now and before[name] != now[name]]
    return ", ".join(f"{name} {before[name]} there, {now[name]} now" for name in changed)
