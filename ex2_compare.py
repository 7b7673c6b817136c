"""The training study: a grid of runs from one configuration, as a table, as curves and as samples from the same noise
(2.2 training, 2.3 compare the schedules, 2.4 null token).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import torch

import ex2_viz as viz
from ex2_config import CHECKPOINT_NAME, Config, build_diffusion, load_checkpoint, restore_model
from ex2_data import InputError
from ex2_diffusion import sample_in_batches
from ex2_training import RunLog

VARIABLE_GROUPS = ("diffusion process", "model", "training")  # the data and the seed are the same for all runs
LOSS_SHARES = (0.1, 0.5, 0.9)  # of T: the times whose test loss stands in the table
COLUMNS_SHOWN = 10
NOT_COMPARABLE = (
    "Raw losses of different schedules or numbers of timesteps are not comparable: at the same t each has another "
    "noise level, and their means weigh the noise levels (log-SNR) differently. Compare the losses at equal log-SNR, "
    "and the samples."
)


# ---------------------------------------------------------------------------- the grid


def parse_vary(texts: list[str]) -> dict[str, list]:
    """{"lr": [0.001, 0.003]} from ["lr=0.001,0.003"], each value of its setting's type.

    Raises:
        InputError: no setting that can be varied, or a value that it doesn't take.
    """
    rules = {f.name: f for f in dataclasses.fields(Config) if f.metadata["group"] in VARIABLE_GROUPS}
    rules = {name: f for name, f in rules.items() if "nargs" not in f.metadata}
    varied: dict[str, list] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in rules or not values:
            raise InputError(f"--vary {text}: give setting=value,value,... with one of {', '.join(sorted(rules))}")
        if name in varied:
            raise InputError(f"--vary names {name} twice: give all its values at once, separated by commas")
        kind = rules[name].metadata.get("type", bool)
        try:
            varied[name] = [parse_value(value, kind) for value in values.split(",")]
        except ValueError:
            raise InputError(f"--vary {text}: every value must be of type {kind.__name__}") from None
        if len(set(varied[name])) != len(varied[name]):
            raise InputError(f"--vary {text}: a value is there twice")
    return varied


def parse_value(text: str, kind: type):
    """The value that `text` stands for."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def grid_of_runs(base: Config, varied: dict[str, list]) -> dict[str, Config]:
    """name -> Config of every combination of the varied settings; all run in folders of `base`'s run folder.

    Raises:
        InputError: a combination that is out of range.
    """
    runs = {}
    for values in itertools.product(*varied.values()):
        changes = dict(zip(varied, values))
        name = ",".join(f"{setting}={value}" for setting, value in changes.items())
        runs[name] = dataclasses.replace(base, results_dir=str(base.run_dir), run_name=name, **changes)
    return runs


def is_judged(config: Config, count: int) -> bool:
    """Whether an earlier call left the figures of the finished run, with `count` samples."""
    metrics, checkpoint = config.run_dir / "test_metrics.json", config.run_dir / CHECKPOINT_NAME
    if not metrics.is_file() or metrics.stat().st_mtime < checkpoint.stat().st_mtime:
        return False
    report = json.loads(metrics.read_text())
    return report.get("samples", {}).get("count", 0) == count


# ---------------------------------------------------------------------------- what comes out


def write_comparison(runs: dict[str, Config], varied: dict[str, list], out: Path, device) -> None:
    """table.csv, table.md, curves.png and samples.png of finished and judged runs."""
    reports = {name: json.loads((config.run_dir / "test_metrics.json").read_text()) for name, config in runs.items()}
    logs = {name: RunLog.read(config.run_dir / "log.csv") for name, config in runs.items()}
    rows = [table_row(config, varied, reports[name], logs[name]) for name, config in runs.items()]
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = as_markdown(rows)
    (out / "table.md").write_text(f"{table}\n{NOT_COMPARABLE}\n", encoding="utf-8")
    print(f"{table}\n{NOT_COMPARABLE}")
    losses = {name: report["losses"]["test"] for name, report in reports.items()}
    viz.plot_comparison(logs, losses, out / "curves.png")
    draw_side_by_side(runs, out / "samples.png", device)


def table_row(config: Config, varied: dict[str, list], report: dict, log: list[dict]) -> dict:
    """One run's figures, varied settings first; the losses are l2 on the test set."""
    row = {name: getattr(config, name) for name in varied}
    losses = report["losses"]["test"]
    for share in LOSS_SHARES:
        k = min(range(len(losses["t"])), key=lambda k: abs(losses["t"][k] + 1 - share * config.timesteps))
        row[f"loss at {share:g} T"] = losses["l2"][k]
    row["bits/dim"] = min(report["bits_per_dim"][name]["total"] for name in ("beta", "beta_tilde"))
    if "samples" in report:
        own = next(r for r in report["samples"]["by_scale"] if r["guidance_scale"] == config.sampling["guidance_scale"])
        row["Fréchet distance"] = own["frechet_distance"]
        row["precision"], row["recall"] = own["precision"], own["recall"]
        row["class accuracy"] = own.get("class_accuracy")
    row["seconds"] = float(log[-1]["seconds"])
    return row


def as_markdown(rows: list[dict]) -> str:
    """A table with the keys of the first row as its head; figures to four digits."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append(["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def draw_side_by_side(runs: dict[str, Config], path: Path, device) -> None:
    """A row of samples for every run; a column starts from the same noise, and is of one class where there are any."""
    rows = []
    for config in runs.values():
        checkpoint = load_checkpoint(config.run_dir)
        names = checkpoint["class_names"]
        classes = torch.arange(COLUMNS_SHOWN) % len(names) if config.class_free_guidance else None
        batches = sample_in_batches(
            build_diffusion(config, device),
            restore_model(checkpoint, config, device),
            COLUMNS_SHOWN,
            config.sample_batch,
            config.seed,
            classes=classes,
            **config.sampling,
        )
        rows.append(torch.cat(list(batches)))
    labels = [name.replace(",", "\n") for name in runs]
    viz.save_grid(torch.cat(rows), path, COLUMNS_SHOWN, labels, title="same noise in every column")
