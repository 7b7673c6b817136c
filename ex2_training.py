"""What a training run keeps beside the model: optimiser, learning-rate schedule, averaged weights, log, saved state."""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ex2_config import CHECKPOINT_NAME, TRAINING_GROUPS, Config, config_of, load_checkpoint, save_checkpoint
from ex2_data import InputError

LOG_COLUMNS = ("step", "epoch", "seconds", "lr", "grad_norm", "train_loss", "epoch_loss", "val_loss")


class RunError(RuntimeError):
    """A run that can't go on, for a reason that is not the command line's; the message is one line."""


class TrainingState:
    """Everything that training changes: weights, their average, the optimiser's moments and the learning rate."""

    def __init__(self, model, config: Config, total_steps: int, device: torch.device):
        self.model = model
        self.device = device
        self.ema = build_ema(model, config.ema_decay)
        self.optimizer = AdamW(model.parameters(), lr=config.lr)
        self.scheduler = build_scheduler(self.optimizer, config.warmup_steps, total_steps)

    def save(self, config: Config, class_names, epochs_done: int, step: int) -> None:
        """Writes the run's checkpoint: `restore_model` makes a model of it, and `resume` goes on from it."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        save_checkpoint(
            config.run_dir / CHECKPOINT_NAME,
            config=dataclasses.asdict(config),
            class_names=list(class_names),
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict(),
            ema_updates=int(self.ema.n_averaged),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            epoch=epochs_done,
            step=step,
            random=random,
        )

    def resume(self, config: Config, class_names) -> int:
        """Goes back to what an earlier run of the same name saved; returns its epochs, 0 where there is none.

        Raises:
            InputError: it was trained with other settings, or on other classes.
        """
        path = config.run_dir / CHECKPOINT_NAME
        if config.dry_run or not path.is_file():
            return 0
        saved = load_checkpoint(path)
        check_same_settings(config_of(saved, {}), config)
        if saved["class_names"] != list(class_names):
            raise InputError(
                f"{config.run_dir} holds a run on other classes ({', '.join(saved['class_names'])} there, "
                f"{', '.join(class_names)} now): choose another --run_name"
            )
        self.model.load_state_dict(saved["model"])
        self.ema.module.load_state_dict(saved["ema"])
        self.ema.n_averaged.fill_(saved["ema_updates"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
        print(f"{path}: {saved['epoch']} of {config.epochs} epochs are done, going on from there")
        return saved["epoch"]


def check_same_settings(before: Config, now: Config) -> None:
    """Raises an InputError that names the settings of the training in which two configs differ."""
    names = [f.name for f in dataclasses.fields(now) if f.metadata["group"] in TRAINING_GROUPS or f.name == "seed"]
    changed = [name for name in names if getattr(before, name) != getattr(now, name)]
    if changed:
        what = ", ".join(f"--{name} {getattr(before, name)} there, {getattr(now, name)} now" for name in changed)
        raise InputError(f"{now.run_dir} holds a run with other settings ({what}): choose another --run_name")


def build_scheduler(optimizer, warmup_steps: int, total_steps: int):
    """Linear warm-up, then cosine decay to zero; counts optimiser steps."""
    warmup = min(warmup_steps, total_steps // 10)
    decay = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup))
    if warmup == 0:
        return decay
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, decay], milestones=[warmup])


def build_ema(model, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, with decay min(decay, (1 + n) / (10 + n)) after n updates.

    The ramp matters for short runs: with a constant 0.9999 the average of 750 steps would be 93% initial noise. The
    first update copies the initial weights, so that n counts the optimiser steps.
    """

    def ramped_average(averages, weights, _):
        n = int(ema.n_averaged)  # lives on the CPU, unlike the copy that torch hands over: no wait for the device
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, weights, n)

    ema = AveragedModel(model, multi_avg_fn=ramped_average)
    ema.update_parameters(model)
    return ema


class LossMeter:
    """Loss of one epoch as mean over images; reads the device once per window, not once per step."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.window: list[tuple] = []  # (loss, gradient norm, images, lr) of the steps since the last row of the log
        self.steps, self.images, self.total = 0, 0, 0.0

    def add(self, loss, grad_norm, images: int, lr: float) -> None:
        self.window.append((loss, grad_norm, images, lr))

    def close_window(self) -> tuple[float, float]:
        """Mean loss over the images and mean gradient norm over the steps of the window, which starts anew.

        Raises:
            RunError: a loss or a gradient of the window is not finite.
        """
        losses, norms, counts, rates = zip(*self.window)
        losses, norms, counts = torch.stack(losses).double().cpu(), torch.stack(norms).cpu(), torch.tensor(counts)
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            bad = int(finite.int().argmin())
            raise RunError(
                f"the loss or its gradient is not finite in step {self.steps + bad + 1} of epoch {self.epoch + 1} "
                f"(learning rate {rates[bad]:.2g}): lower --lr or --grad_clip, or use --no_amp, and choose a new "
                "--run_name; the last checkpoint is untouched"
            )
        window_total = (losses * counts).sum().item()
        self.total += window_total
        self.images += int(counts.sum())
        self.steps += len(counts)
        self.window.clear()
        return window_total / int(counts.sum()), norms.mean().item()

    @property
    def mean(self) -> float:
        return self.total / self.images


class RunLog:
    """log.csv of a run: a row per log interval and per epoch; empty cells where a row has no such figure.

    Args:
        first_epoch: rows of this epoch and later ones, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, first_epoch: int):
        self.path = path
        rows = self.rows() if first_epoch > 0 and path.is_file() else []
        kept = [row for row in rows if None not in row.values() and int(row["epoch"]) < first_epoch]
        self.started = time.perf_counter() - (float(kept[-1]["seconds"]) if kept else 0)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

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
