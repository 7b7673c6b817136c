"""The curves of a training (2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ex2_viz import curve_axes


def read_column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of log.csv, where it has a value."""
    filled = [row for row in rows if row[name] != ""]
    return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]


def plot_training(rows: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """Loss, learning rate and gradient norm over the optimiser steps, from the rows of log.csv."""
    with curve_axes(path, 3) as axes:
        axes[0].plot(*read_column(rows, "train_loss"), alpha=0.5, label="train, mean since the last row")
        axes[0].plot(*read_column(rows, "epoch_loss"), "o-", label="train, mean of the epoch")
        axes[0].plot(*read_column(rows, "val_loss"), "o-", label="val, EMA weights, fixed t and noise")
        axes[0].set(title="loss of the predicted noise", yscale="log")
        axes[0].legend(fontsize=8)
        axes[1].plot(*read_column(rows, "lr"))
        axes[1].set(title="learning rate")
        axes[2].plot(*read_column(rows, "grad_norm"))
        axes[2].set(title="gradient norm before clipping, mean", yscale="log")
        for ax in axes:
            ax.set_xlabel("optimiser step")
