"""The metrics of a run as tables, as curves and as `test_metrics.json` (2.2 e, 2.3, 2.4 c)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ex2.evaluation.sanity import images_seen, reference_losses, verdict
from ex2.evaluation.tables import print_losses, print_samples
from ex2.machine.files import read_json, write_json
from ex2.machine.processes import is_main
from ex2.settings.config import Config
from ex2.training.log import RunLog
from ex2_viz import curve_axes, read_column


def write_metrics(report: dict, config: Config, log: list[dict] | None = None) -> None:
    """The report as tables, as curves and as `test_metrics.json` of the run; the first process alone writes.

    Metrics of samples that are there from an earlier test stay where the losses show that the weights are the same.

    log: rows of log.csv of the training, where it is not in the folder of `config`.
    """
    if not is_main():
        return
    path = config.run_dir / "test_metrics.json"
    before, samples = read_json(path), report.get("samples")
    kept = {"samples": before["samples"]} if "samples" in before and before.get("losses") == report["losses"] else {}
    write_json(path, {**kept, **report})
    settings = dataclasses.asdict(config)
    log = RunLog.read(config.run_dir / "log.csv") if log is None else log
    reference = reference_losses(settings, report, images_seen(settings, log))
    curves = {**report["losses"], **({"our run": reference} if reference else {})}
    plot_loss_over_t(curves, config.run_dir / "loss_over_t.png")
    plot_bits_per_dim(report["bits_per_dim"], config.timesteps, config.run_dir / "bits_per_dim.png")
    if samples and len(samples["by_scale"]) > 1:
        plot_guidance(samples, config.run_dir / "guidance_curve.png")
    print_losses(report)
    if samples:
        print_samples(samples)
    if not config.dry_run:
        print("is this normal?", *verdict(settings, report, log), sep="\n  ")


def plot_loss_over_t(curves: Mapping[str, Mapping], path: str | Path) -> None:
    """2.2 e: loss of the noise and of the x_0 estimate over the timesteps; name -> what `loss_over_timesteps` gives.

    "optimal" is dashed: no model is below it on training images. "our run" is dotted, a run to compare with.
    """
    with curve_axes(path, 3) as axes:
        titles = ("l1 loss of the predicted noise", "l2 loss of the predicted noise", r"l2 error of the $x_0$ estimate")
        for ax, loss, title in zip(axes, ("l1", "l2", "x_zero_l2"), titles):
            for (name, curve), style in zip(curves.items(), itertools.cycle(("o-", "s--", "^:", "v-.", "d-"))):
                style = {"optimal": "k--", "our run": "k:"}.get(name, style)
                if loss in curve:
                    ax.plot([t + 1 for t in curve["t"]], curve[loss], style, label=name.replace("_", ", "), alpha=0.8)
            ax.set(title=title, xlabel="t", yscale="log")
            lowest = min(min(curve.get(loss, [1])) for name, curve in curves.items() if name != "optimal")
            ax.set_ylim(bottom=0.5 * max(lowest, 1e-6))  # the optimal loss can be 0
            ax.legend(fontsize=7)


def plot_comparison(logs: Mapping, losses: Mapping, groups: Mapping[str, str], path: str | Path) -> None:
    """2.3: training and validation loss over the steps, and test loss over log-SNR, of several runs.

    Args:
        logs: name -> rows of its log.csv.  losses: name -> what `loss_over_timesteps` gives.
        groups: name -> what the run differs in from others; runs of several seeds have one colour.
    """
    colours = {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups.values()))}
    with curve_axes(path, 3) as axes:
        for name, rows in logs.items():
            seen = groups[name] in axes[2].get_legend_handles_labels()[1]
            how = {"label": None if seen else groups[name], "color": colours[groups[name]], "alpha": 0.7}
            axes[0].plot(*read_column(rows, "train_loss"), "-", **how)
            axes[1].plot(*read_column(rows, "val_loss"), "o-", **how)
            axes[2].plot(losses[name]["log_snr"], losses[name]["l2"], "o-", **how)
        axes[0].set(title="training loss", xlabel="optimiser step", yscale="log")
        axes[1].set(title="validation loss, EMA weights", xlabel="optimiser step", yscale="log")
        axes[2].set(title="test l2 loss at equal noise level", xlabel="log-SNR: noise left, image right", yscale="log")
        for ax in axes:
            ax.legend(fontsize=7)


def plot_bits_per_dim(vlb: Mapping, timesteps: int, path: str | Path) -> None:
    """2.2 e: the terms of the VLB over the timesteps, and their running sum; `vlb` of `bits_per_dim`."""
    with curve_axes(path, 2) as axes:
        starts = [1, *(t + 1 for t in vlb["t"])]  # of the decoder, then of the strata; as in the paper
        sizes = np.diff([*starts, timesteps + 1])
        for name, label in (("beta", r"$\sigma_t^2 = \beta_t$"), ("beta_tilde", r"$\sigma_t^2 = \tilde\beta_t$")):
            terms = np.array([vlb[name]["decoder"], *vlb[name]["terms"]])
            axes[0].step([*starts, timesteps + 1], [*terms, terms[-1]], where="post", label=label)
            axes[1].plot([*starts, timesteps + 1], [0, *np.cumsum(sizes * terms)], "o-", label=label, markersize=3)
        axes[0].set(title=r"$L_{t-1}$ of the VLB, bits per dimension", yscale="log")
        axes[1].set(title="their sum up to t")
        for ax in axes:
            ax.set(xlabel="t", xscale="log")
            ax.legend()


def plot_guidance(report: Mapping, path: str | Path) -> None:
    """2.4 c: metrics of samples (`evaluate_samples`) over the guidance scale; those of test images are dashed lines."""
    with curve_axes(path, 3) as axes:
        rows, test = report["by_scale"], report["test_images"]
        for name, panel in (("class_accuracy", 0), ("precision", 1), ("recall", 1), ("frechet_distance", 2)):
            if name in rows[0]:
                scales, values = [row["guidance_scale"] for row in rows], [row[name] for row in rows]
                line = axes[panel].plot(scales, values, "o-", label=name.replace("_", " "))
                if test[name] is not None:
                    axes[panel].axhline(test[name], color=line[0].get_color(), linestyle="--", alpha=0.6)
        axes[0].set(title="samples that show their class", ylim=(0, 1.05))
        axes[1].set(title="precision and recall", ylim=(0, 1.05))
        axes[1].legend()
        axes[2].set(title="Fréchet distance", yscale="log")
        for ax in axes:
            ax.set_xlabel("guidance scale w (dashed: test images)")
