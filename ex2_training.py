"""What a training run keeps beside the model: optimiser, learning-rate schedule, averaged weights, log, saved state."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ex2_checkpoint import CHECKPOINT_NAME, PREVIOUS, load_checkpoint, save_checkpoint, write_atomically
from ex2_config import TRAINING_GROUPS, Config, config_of
from ex2_data import InputError
from ex2_distributed import (
    Agreement,
    from_main,
    is_main,
    is_restart,
    mean_over_processes,
    rank,
    world_size,
)
from ex2_loader import EpochPlan

EMA_RAMP = 0.1  # of the images seen is what the averaged weights at most take to forget half
LOG_COLUMNS = ("step", "epoch", "seconds", "lr", "grad_norm", "train_loss", "epoch_loss", "val_loss")


class RunError(RuntimeError):
    """A run that can't go on, for a reason that is not the command line's; the message is one line."""


class Draw(NamedTuple):
    """What an optimiser step draws."""

    t: Tensor  # (B,) times, of the B images of the batch that this process has
    noise: Tensor  # like the images
    batch_size: int  # images of the step, over all processes
    weight: float  # of these images' mean loss, so that the mean over processes is the mean over the batch


def draw_for(images: Tensor, timesteps: int) -> Draw:
    """Times and noise for a whole batch, from torch's global generator."""
    t = torch.randint(0, timesteps, (len(images),), device=images.device)
    return Draw(t, torch.randn_like(images), len(images), 1.0)


class TrainingState:
    """Everything that training changes: weights, their average, the optimiser's moments and the learning rate.

    Several processes hold it all, and change it alike; the first one alone saves it.

    Args:
        total_steps: optimiser steps of the whole training.  steps_per_epoch: of one epoch.

    Attributes:
        model: the U-Net, whose weights are saved.  network: what is called in training: the U-Net, or what shares its
            gradients with the other processes.
    """

    def __init__(self, model, config: Config, class_names, total_steps: int, steps_per_epoch: int, device):
        self.model = self.network = model
        self.config = config
        self.class_names = list(class_names)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)  # of the times and noise, see `draw`
        self.agreement = Agreement()
        self.ema = build_ema(model, config.ema_images, config.batch_size)
        self.optimizer = build_optimizer(model, config.lr, config.adam_beta1)
        self.seconds = 0.0  # that training has taken as of the last step, in all calls of the program
        self.started = time.monotonic()
        self.scheduler = build_scheduler(self.optimizer, config.warmup_steps, total_steps, lambda: self.time_spent)
        self.epochs_done = 0  # epochs that are over, their validation included
        self.step = 0  # optimiser steps that are done
        self.meter = LossMeter(0, shared=True)  # of the epoch that is going on
        self.saved_at = time.monotonic()

    def start(self) -> None:
        """Readies `network`, by which processes train on the mean of their gradients (DDP), and starts the clock."""
        self.started = time.monotonic() - self.seconds
        self.agreement.agreed = (0, self.seconds)
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, devices, gradient_as_bucket_view=True)
        if self.config.compile:
            self.network = torch.compile(self.network, dynamic=False)

    def count_step(self, signal_number: int) -> int:
        """Counts an optimiser step and its time; returns the signal number, of any process, to stop for, 0 for none."""
        self.step += 1
        last = self.first_batch == self.steps_per_epoch
        number, self.seconds = self.agreement(signal_number, time.monotonic() - self.started, at_once=last)
        return number

    @property
    def time_spent(self) -> float:
        """Share of `max_minutes` that training has taken; 0 without such a limit."""
        return self.seconds / 60 / self.config.max_minutes if self.config.max_minutes else 0.0

    @property
    def finished(self) -> bool:
        """Whether every epoch is done, or the time is up."""
        return self.step >= self.total_steps and self.first_batch == 0 or self.time_spent >= 1

    def end_epoch(self) -> None:
        """Counts an epoch, its validation included; where the time is up it stays the last one, as far as it came."""
        if self.first_batch == self.steps_per_epoch:
            self.epochs_done += 1
            self.meter = LossMeter(self.epochs_done, shared=True)

    def draw(self, images: Tensor, timesteps: int, plan: EpochPlan) -> Draw:
        """Times and noise of the next step, for those of its images that this process has.

        They depend on the seed and the step alone, and are drawn for the whole batch, of which each process takes its
        rows: so a resumed run computes what an uninterrupted one does, and several processes what one does, to
        rounding. What the network draws itself, as which labels to drop, differs by process.
        """
        shared, *own = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1 + world_size()).tolist()
        self.generator.manual_seed(shared)
        torch.manual_seed(own[rank()])
        total = plan.images_in(self.first_batch)
        rows, weight = plan.own_rows(self.first_batch)
        t = torch.randint(0, timesteps, (total,), generator=self.generator, device=self.device)[rows]
        noise = torch.randn(total, *images.shape[1:], generator=self.generator, device=self.device)[rows]
        return Draw(t, noise, total, weight)

    @property
    def first_batch(self) -> int:
        """Batches of the epoch going on that are done."""
        return self.step - self.epochs_done * self.steps_per_epoch

    def save(self) -> None:
        """Writes the run's checkpoint: `restore_model` makes a model of it, and `resume` goes on from it.

        Raises:
            RunError: a loss since the last row of the log is not finite; the last checkpoint is untouched.
        """
        if not self.config.save_model or not is_main():
            return
        self.meter.check_finite()
        save_checkpoint(
            self.config.run_dir / CHECKPOINT_NAME,
            config=dataclasses.asdict(self.config),
            class_names=self.class_names,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict(),
            ema_updates=int(self.ema.n_averaged),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            epoch=self.epochs_done,
            step=self.step,
            seconds=self.seconds,
            meter=self.meter.state_dict(),
            processes=world_size(),
        )
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Saves where the last checkpoint is `save_minutes` old."""
        if time.monotonic() - self.saved_at > 60 * self.config.save_minutes:
            self.save()

    def drop_previous(self) -> None:
        """Removes the checkpoint before the newest, which a finished run needs no more: pools have small quotas."""
        path = self.config.run_dir / CHECKPOINT_NAME
        if is_main() and path.is_file():
            path.with_name(path.name + PREVIOUS).unlink(missing_ok=True)

    def needed_space(self) -> int:
        """Bytes that the run will take: three checkpoints while one is being replaced, and pictures."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 3 * 4 * weights + 20_000_000  # a checkpoint holds weights, average and two moments

    def resume(self) -> None:
        """Goes back to what an earlier run of the same name saved, where there is something and `resume` allows it.

        Raises:
            InputError: it was trained with other settings or on other classes, or `resume` insists and there is none.
        """
        config = self.config
        saved = from_main(self.find_checkpoint, "the checkpoint")
        if saved is None:
            return
        changed = changed_settings(config_of(saved, {}), config)
        if changed and not config.allow_changes:
            raise InputError(
                f"{config.run_dir} holds a run with other settings ({changed}): choose another --run_name, or go on "
                "with the new ones by --allow_changes"
            )
        if saved["class_names"] != self.class_names:
            raise InputError(
                f"{config.run_dir} holds a run on other classes ({', '.join(saved['class_names'])} there, "
                f"{', '.join(self.class_names)} now): choose another --run_name"
            )
        self.load_weights(saved)
        self.epochs_done, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.meter = LossMeter(self.epochs_done, shared=True)
        if changed:
            print(f"{config.run_dir}: going on with other settings ({changed}), from the start of the epoch")
            self.step = self.epochs_done * self.steps_per_epoch
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimiser made no step: it made them in the earlier run
                for _ in range(min(self.step, self.total_steps)):
                    self.scheduler.step()
        else:
            self.scheduler.load_state_dict(saved["scheduler"])
            self.meter.load_state_dict(saved["meter"])
        if not 0 <= self.first_batch <= self.steps_per_epoch:
            raise InputError(f"{config.run_dir} holds a run on other images: choose another --run_name")
        if saved["processes"] != world_size():
            there, now = saved["processes"], world_size()
            print(f"{there} processes there, {now} now: a step still takes {config.batch_size} images in all")
        print(
            f"{config.run_dir}: {self.step} of {self.total_steps} steps ({self.epochs_done} of {config.epochs} epochs) "
            "are done, going on from there"
        )

    def find_checkpoint(self) -> dict | None:
        """What the run is to go on from; None to start anew. A run that lost a process always goes on."""
        config = self.config
        there = any(config.run_dir.glob(f"{CHECKPOINT_NAME}*"))
        if config.resume and not there:
            raise InputError(f"--resume: no checkpoint in {config.run_dir}; drop the flag to start a new run")
        anew = config.resume is False and not is_restart()
        return None if config.dry_run or anew or not there else load_checkpoint(config.run_dir)

    def load_weights(self, saved: dict) -> None:
        """Weights, their average and the optimiser's moments of a checkpoint.

        Raises:
            InputError: they are of a model of another size.
        """
        try:
            self.model.load_state_dict(saved["model"])
            self.ema.module.load_state_dict(saved["ema"])
        except RuntimeError as error:
            raise InputError(
                f"the weights in {self.config.run_dir} don't fit the model's settings: choose another --run_name"
            ) from error
        self.ema.n_averaged.fill_(saved["ema_updates"])
        for group in saved["optimizer"]["param_groups"]:
            for name in ("fused", "betas"):  # this machine's and this run's, and not those of the one which saved it
                group[name] = self.optimizer.defaults[name]
        self.optimizer.load_state_dict(saved["optimizer"])


def changed_settings(before: Config, now: Config) -> str:
    """The settings of the training in which two configs differ, with both values; empty where there are none."""
    names = [f.name for f in dataclasses.fields(now) if f.metadata["group"] in TRAINING_GROUPS or f.name == "seed"]
    changed = [name for name in names if getattr(before, name) != getattr(now, name)]
    return ", ".join(f"--{name} {getattr(before, name)} there, {getattr(now, name)} now" for name in changed)


def build_optimizer(model, lr: float, beta1: float = 0.9) -> AdamW:
    """AdamW, in one pass over all weights where torch has that for their device: hundreds of small ones take time."""
    settings = {"lr": lr, "betas": (beta1, 0.999)}
    try:
        return AdamW(model.parameters(), **settings, fused=True)
    except RuntimeError:  # of a CPU before torch 2.4
        return AdamW(model.parameters(), **settings)


def build_scheduler(
    optimizer, warmup_steps: int, total_steps: int, time_spent: Callable[[], float] = lambda: 0.0
) -> LambdaLR:
    """Linear warm-up over optimiser steps, then cosine decay to zero at the last step, or earlier, when the time is up.

    Args:
        time_spent: share of the time that training may take.
    """
    warmup = min(warmup_steps, total_steps // 10)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup + 1))
        done = max((step - warmup) / max(1, total_steps - warmup), time_spent())
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    return LambdaLR(optimizer, factor)


def build_ema(model, ema_images: float, batch_size: int) -> AveragedModel:
    """An exponential moving average of the weights: forgets half in `ema_images` images, or in a tenth of those seen.

    The ramp matters for short runs: with a constant decay of 0.9999 the average of 750 steps would be 93% initial
    weights. It is that of EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364), at twice its length. The first
    update copies the initial weights, so that n counts the optimiser steps.
    """

    def ramped_average(averages, weights, _):
        n = int(ema.n_averaged)  # lives on the CPU, unlike the copy that torch hands over: no wait for the device
        half_life = min(ema_images, EMA_RAMP * n * batch_size)
        get_ema_multi_avg_fn(0.5 ** (batch_size / half_life))(averages, weights, n)

    ema = AveragedModel(model, multi_avg_fn=ramped_average)
    ema.update_parameters(model)
    return ema


class LossMeter:
    """Loss of one epoch as mean over images; reads the device once per window, not once per step.

    Args:
        shared: the losses are means over all processes, which add theirs at the same time.
    """

    def __init__(self, epoch: int, *, shared: bool = False):
        self.epoch, self.shared = epoch, shared
        self.window: list[tuple] = []  # (loss, gradient norm, images, lr) of the steps since the last row of the log
        self.steps, self.images, self.total = 0, 0, 0.0

    def add(self, loss, grad_norm, images: int, lr: float) -> None:
        self.window.append((mean_over_processes(loss) if self.shared else loss, grad_norm, images, lr))

    def read_window(self) -> tuple:
        """(losses, gradient norms, images, learning rates) of the window, one entry per step.

        Raises:
            RunError: a loss or a gradient is not finite.
        """
        losses, norms, counts, rates = zip(*self.window)
        losses, norms, counts = torch.stack(losses).cpu(), torch.stack(norms).cpu(), torch.tensor(counts)
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            bad = int(finite.int().argmin())
            raise RunError(
                f"the loss or its gradient is not finite in step {self.steps + bad + 1} of epoch {self.epoch + 1} "
                f"(learning rate {rates[bad]:.2g}): lower --lr or --grad_clip, or give --amp off, and choose a new "
                "--run_name; the last checkpoint is untouched"
            )
        return losses, norms, counts, rates

    def check_finite(self) -> None:
        """Raises a RunError where a loss or a gradient of the window is not finite."""
        if self.window:
            self.read_window()

    def close_window(self) -> tuple[float, float]:
        """Mean loss over the images and mean gradient norm over the steps of the window, which starts anew.

        Raises:
            RunError: a loss or a gradient of the window is not finite.
        """
        losses, norms, counts, _ = self.read_window()
        window_total = (losses.double() * counts).sum().item()
        self.total += window_total
        self.images += int(counts.sum())
        self.steps += len(counts)
        self.window.clear()
        return window_total / int(counts.sum()), norms.mean().item()

    @property
    def mean(self) -> float:
        return self.total / self.images

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the epoch that is going on."""
        window = [(loss.cpu(), norm.cpu(), images, lr) for loss, norm, images, lr in self.window]
        return {"steps": self.steps, "images": self.images, "total": self.total, "window": window}

    def load_state_dict(self, saved: dict) -> None:
        """Goes on with what `state_dict` gave."""
        self.steps, self.images, self.total = saved["steps"], saved["images"], saved["total"]
        self.window = [tuple(entry) for entry in saved["window"]]


class RunLog:
    """log.csv of a run: a row per log interval and per epoch; empty cells where a row has no such figure.

    Args:
        epochs_done, step: where the run stands. Later rows, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, epochs_done: int = 0, step: int = 0):
        self.path = path
        rows = self.rows() if step > 0 and path.is_file() else []
        kept = [row for row in rows if None not in row.values() and self.belongs(row, epochs_done, step)]
        self.started = time.perf_counter() - (float(kept[-1]["seconds"]) if kept else 0)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue().encode())

    @staticmethod
    def belongs(row: dict, epochs_done: int, step: int) -> bool:
        """Whether a row is of what is done: an epoch's last row comes after its validation."""
        return int(row["epoch"]) < epochs_done or (int(row["step"]) <= step and row["val_loss"] == "")

    def write(self, **figures) -> None:
        row = {"seconds": f"{time.perf_counter() - self.started:.1f}", **figures}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)

    def rows(self) -> list[dict]:
        return self.read(self.path)

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The rows of a log.csv, every cell a string."""
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
