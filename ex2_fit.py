"""A training run from start to end: `fit` goes on from a checkpoint, ends in order on a signal or when the time is up,
keeps a log, and shares the work with other processes. The step itself is `ex2_training.train_step`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ex2_config as cfg
import ex2_job as job
import ex2_viz as viz
from ex2_checkpoint import CHECKPOINT_NAME, PREVIOUS, RunLog, load_checkpoint, save_checkpoint, write_atomically
from ex2_data import DataSplits, InputError
from ex2_diffusion import Diffusion
from ex2_distributed import agreed, from_main, is_main, is_restart, rank, world_size
from ex2_loader import make_loader
from ex2_model import Unet, compile_blocks, is_compiler_error
from ex2_replay import Replayed
from ex2_training import (
    Average,
    LossMeter,
    Rows,
    RunError,
    build_optimizer,
    learning_rate,
    set_learning_rate,
    show_loss,
    test,
    train_step,
)

TIMED = ((2, 6), (10, 30))  # steps of a call between which their time is taken: on a CPU; on a GPU, once it replays
WORTH_COMPILING = 10  # minutes of training left. On an H200 compiling took 112 s and made a step 1.65 times as fast


def fit(config: cfg.Config, splits: DataSplits, diffusor: Diffusion, device) -> Unet:
    """Trains to the end, or goes on from the run's checkpoint; returns the model with its averaged (EMA) weights.

    Raises:
        Interrupted: a signal came; what was trained is saved.
        RunError: the loss or the weights are not finite, or a batch doesn't fit the GPU.
    """
    torch.manual_seed(config.seed)
    model = cfg.build_model(config, len(splits.class_names)).to(device)
    how = {"train": True, "flip": config.flip, "seed": config.seed, "part": (rank(), world_size())}
    loader = make_loader(splits.train, config.batch_size, device, num_workers=config.num_workers, **how)
    val_loader = make_loader(splits.val, config.batch_size * 2, device, num_workers=config.num_workers)
    training = Training(model, config, diffusor, loader, splits.class_names)
    training.resume()
    training.open_log()
    if not training.finished:
        announce(config, splits, model, diffusor, training.total_steps - training.step)
        training.start()
    try:
        while not training.finished:
            loss = training.train_epoch()
            val = test(training.average.model, val_loader, diffusor, device, config)
            training.end_epoch(loss, sum(val[config.loss_type]) / len(val["t"]))
    except (job.Interrupted, BrokenPipeError):  # a signal; or nobody reads what is printed
        if not training.within_step:
            with job.signals_held():
                training.save()
        raise
    finally:
        training.step_on = None  # and with it the memory of its recordings
    training.drop_previous()
    return training.average.model.eval()


def announce(config: cfg.Config, splits: DataSplits, model, diffusor: Diffusion, steps: int) -> None:
    """Says what is about to be trained, on what, how and how long."""
    size, precision = f"{config.image_size}x{config.image_size}", "float32"
    if job.computes_in_bfloat16(config.amp, diffusor.device):
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
        model: the U-Net, whose weights are saved.  network: what is called: the U-Net, or DDP around it.
        step: optimiser steps that are done.  epochs_done: epochs that are over, their validation included.
        seconds: of training as of the last step, in all calls of the program.  meter: losses of the epoch going on.
    """

    def __init__(self, model: Unet, config: cfg.Config, diffusor: Diffusion, loader, class_names):
        self.model = self.network = model
        self.config, self.diffusor, self.loader = config, diffusor, loader
        self.device = diffusor.device
        self.settings = {name: getattr(config, name) for name in ("loss_type", "grad_clip", "min_snr")}
        self.settings["amp"] = job.computes_in_bfloat16(config.amp, self.device)
        self.class_names = list(class_names)
        self.epochs, self.steps_per_epoch = (1, 1) if config.dry_run else (config.epochs, len(loader))
        self.total_steps = self.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(model, config.lr, config.adam_beta1)
        self.average = Average(model, config.ema_images, config.batch_size)
        self.log = None  # the first process has one
        self.within_step = False  # then it must not be saved: a second Ctrl-C ends it there
        self.step, self.epochs_done, self.seconds, self.lr = 0, 0, 0.0, config.lr
        self.meter = LossMeter(0)
        self.started = self.saved_at = time.monotonic()
        self.step_on = self.eager_step  # or its replay
        self.steps_here, self.timed = 0, []  # steps of this call, and when those of `TIMED` ended

    @property
    def first_batch(self) -> int:
        """How many batches of the current epoch are done."""
        return self.step - self.epochs_done * self.steps_per_epoch

    @property
    def time_spent(self) -> float:
        """Share of `max_minutes` that training has taken; 0 without such a limit."""
        return self.seconds / 60 / self.config.max_minutes if self.config.max_minutes else 0.0

    @property
    def finished(self) -> bool:
        """Whether every epoch is done, or the time is up."""
        return self.step >= self.total_steps and self.first_batch == 0 or self.time_spent >= 1

    # ------------------------------------------------------------------------ training

    def start(self) -> None:
        """Saves for the first time, connects the processes, and starts the clock."""
        if self.config.save_model and is_main():
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            # Three checkpoints while one is being replaced, each of weights, average and two moments; and pictures.
            job.check_space(self.config.run_dir, 3 * 4 * weights + 20_000_000)
        self.save()  # a disk that is full shows now, and not after an epoch
        self.started = time.monotonic() - self.seconds
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, devices, gradient_as_bucket_view=True)
        self.choose_step(compiled=self.config.compile == "on")

    def choose_step(self, compiled: bool) -> None:
        """Chooses the fastest step for this device: replayed on a GPU, with a compiled network if `compiled`."""
        if compiled or self.model.compiled:
            rows, _ = self.loader.plan.own_rows(0)
            compile_blocks(self.model, rows.stop - rows.start if compiled else 0)
        self.step_on = self.eager_step
        if replays(self.config, self.device):
            self.step_on = Replayed(self.eager_step, self.changed_by_step, "the training step")

    def train_epoch(self) -> float:
        """Trains the rest of the current epoch and returns its loss. A signal waits for the end of the step.

        Raises `Interrupted` where one came, to this or another process; the state is that after a whole step.
        """
        self.network.train()
        self.loader.set_epoch(self.epochs_done, self.first_batch)
        bar = {"desc": f"epoch {self.epochs_done + 1}", "total": len(self.loader), "initial": self.first_batch}
        progress = tqdm(self.loader.inputs(), **bar, disable=self.config.dry_run or None)
        with job.signals_held() as waiting:
            for inputs in progress:
                self.take_step(inputs)
                last = self.first_batch == self.steps_per_epoch
                if last or len(self.meter.window) == self.config.log_interval:
                    self.close_window(progress)
                now = time.monotonic() - self.started
                number, self.seconds = agreed(waiting[0] if waiting else 0, now)
                if number:
                    raise job.Interrupted(number)
                if time.monotonic() - self.saved_at > 60 * self.config.save_minutes:
                    self.save()
                if last or self.finished:
                    break
            if self.meter.window:
                self.close_window(progress)
        if waiting:  # it came after the last step
            raise job.Interrupted(waiting[0])
        return self.meter.mean

    def take_step(self, inputs: tuple) -> None:
        """One optimiser step on what the loader's `inputs` gave; a `RunError` says which batch would fit the memory."""
        rows, self.within_step = self.prepare_step(), True
        try:
            loss, norm = self.step_on(*inputs) if rows is None else self.step_on(*inputs, rows=rows)
        except torch.cuda.OutOfMemoryError:
            loss = None  # only after this block the failed step's tensors are gone
        except Exception as error:
            if self.config.compile == "on" or not is_compiler_error(error):
                raise
            print(f"torch can't compile the network here ({str(error).strip().splitlines()[0]}): going on without")
            self.choose_step(compiled=False)
            return self.take_step(inputs)
        if loss is None:
            raise self.too_large(inputs)
        self.meter.add(loss, norm, self.loader.plan.images_in(self.first_batch), self.lr)
        self.step += 1
        self.within_step = False
        self.tell_time()

    def prepare_step(self) -> Rows | None:
        """Sets what changes from step to step: random numbers, learning rate, what the average forgets.

        The random numbers depend on the seed and the step alone, so a resumed run draws what an uninterrupted one does.
        Returns this process's rows of the batch; None where there is one process.
        """
        shared, *own = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1 + world_size()).tolist()
        torch.manual_seed(shared)
        config = self.config
        self.lr = learning_rate(config.lr, self.step, self.total_steps, config.warmup_steps, self.time_spent)
        set_learning_rate(self.optimizer, self.lr)
        self.average.prepare(self.step)
        if world_size() == 1:
            return None
        batch, plan = self.first_batch, self.loader.plan
        return Rows(plan.images_in(batch), *plan.own_rows(batch), own[rank()])

    def eager_step(self, *inputs, rows: Rows | None = None):
        """`train_step` on what the loader's `inputs` gave, with the settings of the run."""
        parts, batch = (self.network, self.optimizer, self.diffusor), self.loader.batch(*inputs)
        return train_step(*parts, *batch, average=self.average, rows=rows, **self.settings)

    def changed_by_step(self) -> dict[str, list]:
        """The tensors that a step changes."""
        moments = {}
        for state in self.optimizer.state.values():
            for name, value in state.items():
                moments.setdefault(name, []).append(value)
        return {"weights": list(self.model.parameters()), "average": self.average.weights, **moments}

    def too_large(self, inputs: tuple) -> RunError:
        """The error that names a batch which fits the GPU's memory. The search for it spoils the weights."""
        # Without the memory of a recording, and without the other processes, which don't search.
        self.step_on, self.network, size = self.eager_step, self.model, len(inputs[0])
        fits = job.batch_that_fits(lambda n: self.eager_step(*(part[:n] for part in inputs)), size)
        advice = f"--batch_size {fits * world_size()} fits" if fits else "not even one image does"
        size *= world_size()
        return RunError(f"--batch_size {size} doesn't fit the GPU's free memory; {advice}, as would a lower --dim")

    def tell_time(self) -> None:
        """After a few steps: says how many are left and how long they take, and compiles if that pays off."""
        self.steps_here += 1
        first, last = TIMED[self.device.type == "cuda"]
        if self.steps_here not in (first, last) or self.config.dry_run:
            return
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.timed.append(time.monotonic())
        if len(self.timed) < 2:
            return
        seconds = (self.timed[1] - self.timed[0]) / (last - first)
        steps, limit = self.total_steps - self.step, self.config.max_minutes
        minutes, size = steps * seconds / 60, self.config.batch_size
        part = f", of which --max_minutes {limit:g} leaves room for a part" if limit and limit < minutes else ""
        print(f"{steps} steps of {size} images are left: about {minutes:.1f} min at {seconds:.3f} s each{part}")
        if on_gpu and self.config.compile == "auto" and min(minutes, limit or minutes) > WORTH_COMPILING:
            print("compiling the network: one to two minutes of waiting, then faster (--compile off does without)")
            self.choose_step(compiled=True)

    def close_window(self, progress: tqdm) -> None:
        """Logs and shows the loss since the last time."""
        loss, norm = self.meter.close_window()
        if self.log is not None:
            self.log.write(step=self.step, epoch=self.epochs_done, lr=self.lr, grad_norm=norm, train_loss=loss)
        show_loss(progress, self.epochs_done, self.first_batch, loss)

    def end_epoch(self, loss: float, val_loss: float) -> None:
        """Prints, logs and saves the end of an epoch, or of the part of it for which there was time."""
        number = self.epochs_done + 1
        if not math.isfinite(val_loss):
            raise RunError(f"the weights are not finite after epoch {number}; the last checkpoint is untouched")
        print(f"epoch {number}/{self.epochs}: train {loss:.4f}, val {val_loss:.4f} ({self.config.loss_type})")
        if self.log is not None:
            self.log.write(step=self.step, epoch=self.epochs_done, epoch_loss=loss, val_loss=val_loss)
        if self.first_batch == self.steps_per_epoch:
            self.epochs_done += 1
            self.meter = LossMeter(self.epochs_done)
        self.save()
        if self.log is not None:
            viz.plot_training(self.log.rows(), self.config.run_dir / "training.png")

    # ------------------------------------------------------------------------ saving and resuming

    def open_log(self) -> None:
        """Opens log.csv and writes config.json beside it; in the first process alone."""
        if not is_main():
            return
        folder, settings = self.config.run_dir, dataclasses.asdict(self.config)
        write_atomically(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        self.log = RunLog(folder / "log.csv", self.epochs_done + (self.time_spent >= 1), self.step)

    def save(self) -> None:
        """Writes the run's checkpoint, unless a loss is not finite: `restore_model` makes a model of it."""
        if not self.config.save_model or not is_main():
            return
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        weights = {"model": self.model.state_dict(), "ema": self.average.model.state_dict(), "optimizer": optimizer}
        progress = {"epoch": self.epochs_done, "step": self.step, "seconds": self.seconds, "processes": world_size()}
        run = {"config": dataclasses.asdict(self.config), "class_names": self.class_names}
        path = self.config.run_dir / CHECKPOINT_NAME
        save_checkpoint(path, **run, **weights, **progress, meter=self.meter.state_dict())
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
            InputError: it was trained with other settings or on other classes, or `resume` insists and there is none.
        """
        config = self.config
        saved = from_main(self.find_checkpoint, "the checkpoint")
        if saved is None:
            return
        changed, other = changed_settings(cfg.config_of(saved, {}), config), "choose another --run_name"
        if changed and not config.allow_changes:
            what = f"{config.run_dir} holds a run with other settings ({changed})"
            raise InputError(f"{what}: {other}, or go on with the new ones by --allow_changes")
        if saved["class_names"] != self.class_names:
            classes = f"{', '.join(saved['class_names'])} there, {', '.join(self.class_names)} now"
            raise InputError(f"{config.run_dir} holds a run on other classes ({classes}): {other}")
        self.load_weights(saved)
        self.epochs_done, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.meter = LossMeter(self.epochs_done)
        if changed:
            print(f"{config.run_dir}: going on with other settings ({changed}), from the start of the epoch")
            self.step = self.epochs_done * self.steps_per_epoch
        else:
            self.meter.load_state_dict(saved["meter"])
        if not 0 <= self.first_batch <= self.steps_per_epoch:
            raise InputError(f"{config.run_dir} holds a run on other images: {other}")
        if (there := saved["processes"]) != world_size():
            print(f"{there} processes there, {world_size()} now: a step still takes {config.batch_size} images in all")
        done = f"{self.step} of {self.total_steps} steps ({self.epochs_done} of {config.epochs} epochs)"
        print(f"{config.run_dir}: {done} are done, going on from there")

    def find_checkpoint(self) -> dict | None:
        """The checkpoint to continue from; None to start anew. A run that lost a process always continues."""
        config = self.config
        there = any(config.run_dir.glob(f"{CHECKPOINT_NAME}*"))
        if config.resume and not there:
            raise InputError(f"--resume: no checkpoint in {config.run_dir}; drop the flag to start a new run")
        anew = config.resume is False and not is_restart()
        return load_checkpoint(config.run_dir) if there and not anew and not config.dry_run else None

    def load_weights(self, saved: dict) -> None:
        """Loads weights, average and moments of a checkpoint; an `InputError` if they are of another size."""
        try:
            self.model.load_state_dict(saved["model"])
            self.average.model.load_state_dict(saved["ema"])
        except RuntimeError as error:
            what = f"the weights in {self.config.run_dir} don't fit the model's settings"
            raise InputError(f"{what}: choose another --run_name") from error
        own = self.optimizer.state_dict()["param_groups"]  # betas and kind are those of this run
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": own})
        set_learning_rate(self.optimizer, saved["optimizer"]["param_groups"][0]["lr"])  # until the next step


def replays(config: cfg.Config, device: torch.device) -> bool:
    """Whether the training step is recorded and replayed: on one GPU, where there is more than a single step."""
    return device.type == "cuda" and world_size() == 1 and not config.dry_run


def changed_settings(before: cfg.Config, now: cfg.Config) -> str:
    """The settings of the training in which two configs differ, with both values; empty where there are none."""
    fields = dataclasses.fields(now)
    names = [f.name for f in fields if f.metadata["group"] in cfg.TRAINING_GROUPS or f.name == "seed"]
    changed = [name for name in names if getattr(before, name) != getattr(now, name)]
    return ", ".join(f"--{name} {getattr(before, name)} there, {getattr(now, name)} now" for name in changed)
