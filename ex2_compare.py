"""The training study: a grid of runs from one configuration, with several seeds each, as a table with intervals, as
curves and as samples from the same noise (2.2 training, 2.3 compare the schedules, 2.4 null token and guidance).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import ex2_viz as viz
from ex2_checkpoint import CHECKPOINT_NAME, RunLog, load_checkpoint, read_json, write_atomically
from ex2_config import Config, build_diffusion, build_model, restore_model
from ex2_data import InputError
from ex2_diffusion import sample_in_batches
from ex2_evaluation import as_markdown, how_judged
from ex2_job import FittingModel

VARIABLE_GROUPS = ("diffusion process", "model", "training")  # the data and the seed are the same for all runs
LOSS_SHARES = (0.1, 0.5, 0.9)  # of T: the times whose test loss stands in the table
COLUMNS_SHOWN = 10
# Student's t, the 97.5% quantile for n seeds: n - 1 degrees of freedom.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
NOT_COMPARABLE = (
    "Raw losses of different schedules or numbers of timesteps are not comparable: at the same t each has another "
    "noise level, and their means weigh the noise levels (log-SNR) differently. Compare the losses at equal log-SNR, "
    "and the samples."
)


def parse_vary(texts: list[str]) -> dict[str, list]:
    """{"lr": [0.001, 0.003]} from ["lr=0.001,0.003"], each value of its setting's type.

    Raises InputError: no setting that can be varied, or a value that it doesn't take.
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


def grid_of_runs(base: Config, varied: dict[str, list], num_classes: int, seeds: int = 1) -> dict[str, Config]:
    """name -> Config of every combination of the varied settings, each with `base`'s seed and those after it.

    All run in folders of `base`'s run folder. The first seed is not in the name, so that seeds can be added later.

    Raises InputError: a combination of which no model or no process can be made, or too many seeds.
    """
    if not 1 <= seeds <= max(T_QUANTILES):
        raise InputError(f"--seeds must be at least 1 and at most {max(T_QUANTILES)}, got {seeds}")
    runs = {}
    for *values, seed in itertools.product(*varied.values(), range(base.seed, base.seed + seeds)):
        changes, fixed = dict(zip(varied, values)), {}
        if seed != base.seed:
            changes["seed"] = seed
            fixed = {"data_seed": base.seed if base.data_seed is None else base.data_seed}  # all have the same data
        name = ",".join(f"{setting}={value}" for setting, value in changes.items())
        try:
            runs[name] = dataclasses.replace(base, results_dir=str(base.run_dir), run_name=name, **changes, **fixed)
            build_diffusion(runs[name], "cpu")
            with torch.device("meta"):
                build_model(runs[name], num_classes)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return runs


def write_study(out: Path, varied: dict[str, list], runs: dict[str, Config]) -> None:
    """study.json: what is varied, and the names of the runs; folders of an earlier call may lie beside them."""
    text = json.dumps({"varied": varied, "runs": list(runs)}, indent=2) + "\n"
    write_atomically(out / "study.json", text.encode())


def is_judged(config: Config, judge, count: int, scales: Sequence[float] = ()) -> bool:
    """Whether an earlier call already computed the figures that are asked for now."""
    metrics = config.run_dir / "test_metrics.json"
    saved = max((path.stat().st_mtime for path in config.run_dir.glob(f"{CHECKPOINT_NAME}*")), default=0)
    if not metrics.is_file() or metrics.stat().st_mtime < saved:
        return False
    report = read_json(metrics)
    try:
        losses, samples = report["losses"]["test"], report.get("samples")
        same = report["weights"] == "ema" and len(losses["t"]) == min(config.eval_timesteps, config.timesteps)
        same = same and losses["images"] <= config.eval_images == report["eval_images"]
        same = same and "bits_per_dim" in report and isinstance(samples, dict) == (judge is not None)
        if judge is not None and config.can_guide:
            same = same and set(scales) <= {row["guidance_scale"] for row in samples["by_scale"]}
    except (KeyError, TypeError):  # of another version
        return False
    wanted = {} if judge is None else how_judged(judge, config, count)
    return same and all(samples.get(name) == value for name, value in wanted.items())


def write_comparison(runs: dict[str, Config], varied: dict[str, list], failed: dict, out: Path, device) -> None:
    """table.csv, table.md, curves.png and samples.png of judged runs; those that failed have an empty row.

    table.csv has a row per run and guidance scale, table.md the means over the seeds.
    """
    done = {name: config for name, config in runs.items() if name not in failed}
    reports = {name: read_json(config.run_dir / "test_metrics.json") for name, config in done.items()}
    logs = {name: RunLog.read(config.run_dir / "log.csv") for name, config in done.items()}
    rows = []
    for name, config in runs.items():
        settings = {setting: getattr(config, setting) for setting in (*varied, "seed")}
        figures = figures_of(config, reports[name], logs[name]) if name in done else [{}]
        rows += [{**settings, **row} for row in figures]
    head = max(rows, key=len)
    rows = [{name: row.get(name) for name in head} for row in rows]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(head))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "table.csv", table.getvalue().encode())
    notes = [NOT_COMPARABLE, *(f"{name} failed: {reason}" for name, reason in failed.items())]
    text = as_markdown(over_seeds(rows, list(varied))) + "\n" + "\n\n".join(notes)
    write_atomically(out / "table.md", (text + "\n").encode())
    if done:
        losses = {name: report["losses"]["test"] for name, report in reports.items()}
        groups = {name: ",".join(f"{s}={getattr(config, s)}" for s in varied) for name, config in done.items()}
        viz.plot_comparison(logs, losses, groups, out / "curves.png")
        first = min(config.seed for config in done.values())
        draw_side_by_side({name: c for name, c in done.items() if c.seed == first}, out / "samples.png", device)
    print(text)


def figures_of(config: Config, report: dict, log: list[dict]) -> list[dict]:
    """One run's figures, a row per guidance scale it was judged at.

    The losses are l2 on the test set, at the tested times nearest to `LOSS_SHARES` of T.
    """
    losses, figures = report["losses"]["test"], {}
    for share in LOSS_SHARES:
        k = min(range(len(losses["t"])), key=lambda k: abs(losses["t"][k] + 1 - share * config.timesteps))
        figures[f"loss near {share:g} T"] = losses["l2"][k]
    figures["bits/dim"] = min(report["bits_per_dim"][name]["total"] for name in ("beta", "beta_tilde"))
    rows = []
    for judged in report["samples"]["by_scale"] if "samples" in report else ():
        row = {"w": judged["guidance_scale"], "Fréchet distance": judged["frechet_distance"]}
        row["precision"], row["recall"] = judged["precision"], judged["recall"]
        row["class accuracy"] = judged.get("class_accuracy") if config.class_free_guidance else None
        rows.append(row)
    seconds = {"seconds": round(float(log[-1]["seconds"])) if log else None}
    return [{**figures, **row, **seconds} for row in rows or [{}]]


def over_seeds(rows: list[dict], varied: Sequence[str]) -> list[dict]:
    """One row per combination and guidance scale: means over the seeds, with 95% intervals ("mean ± half its width").

    rows: of table.csv, as numbers or as text.  varied: the settings that were varied.
    """
    several = len({row.get("seed") for row in rows}) > 1
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row.get("bits/dim") in (None, "")):  # failed runs last
        key = tuple(row.get(name) for name in varied)
        failed = row.get("bits/dim") in (None, "")
        if not failed or key not in [other[:-1] for other in groups]:
            groups.setdefault((*key, row.get("w")), []).append(row)
    order = list(dict.fromkeys(tuple(row.get(name) for name in varied) for row in rows))
    return [summary_of(groups[key], varied, several) for key in sorted(groups, key=lambda key: order.index(key[:-1]))]


def summary_of(group: list[dict], varied: Sequence[str], several: bool) -> dict:
    """The row of `over_seeds` for runs that differ in their seed alone; "runs" tells how many, of `several`."""
    summary = {}
    for name in group[0]:
        if name in varied or name == "w":
            summary[name] = group[0][name]
        elif name == "seed":
            count = sum(row.get("bits/dim") not in (None, "") for row in group)
            summary.update({"runs": count} if several else {})
        else:
            summary[name] = mean_and_interval([float(row[name]) for row in group if row[name] not in (None, "")])
    return summary


def mean_and_interval(values: list[float]) -> float | str | None:
    """The mean; from two values on as text, with `half_width`."""
    if len(values) < 2:
        return values[0] if values else None
    return f"{statistics.mean(values):.3g} ± {half_width(values):.2g}"


def half_width(values: list[float]) -> float:
    """Half the width of the 95% interval of the mean of two values or more, by Student's t."""
    return T_QUANTILES[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def draw_side_by_side(runs: dict[str, Config], path: Path, device) -> None:
    """A row of samples for every run; a column starts from the same noise, and is of one class where there are any."""
    rows = []
    for config in runs.values():
        checkpoint = load_checkpoint(config.run_dir)
        classes = torch.arange(COLUMNS_SHOWN) % len(checkpoint["class_names"]) if config.class_free_guidance else None
        diffusor, model = build_diffusion(config, device), FittingModel(restore_model(checkpoint, config, device))
        how = {"classes": classes, **config.sampling}
        batches = sample_in_batches(diffusor, model, COLUMNS_SHOWN, config.sample_batch, config.seed, **how)
        rows.append(torch.cat(list(batches)))
    labels = [name.replace(",", "\n") for name in runs]
    viz.save_grid(torch.cat(rows), path, COLUMNS_SHOWN, labels, title="same noise in every column")
