"""The training study: a grid of runs from one configuration, with several seeds each, as a table with intervals, as
curves and as samples from the same noise (2.2 training, 2.3 compare the schedules, 2.4 null token and guidance).
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import torch

import ex2_viz as viz
from ex2.data.images import DataSplits
from ex2.errors import InputError, Interrupted, RunError
from ex2.evaluation.classifier import Evaluator
from ex2.evaluation.evaluate import evaluate
from ex2.evaluation.samples import evaluation_settings, inference_model
from ex2.evaluation.tables import NOT_COMPARABLE, T_QUANTILES, VARIANCES, as_markdown, sample_cells, summarise_seeds
from ex2.machine.files import as_csv, read_json, write_atomically, write_json
from ex2.machine.processes import broadcast_from_main, is_main, world_size
from ex2.noise import sample_in_batches
from ex2.report.metrics import plot_comparison, write_metrics
from ex2.settings.build import build_diffusion, check_buildable, restore_model
from ex2.settings.config import Config
from ex2.training.checkpoint import checkpoints_in, load_checkpoint
from ex2.training.log import RunLog
from ex2.training.run import fit, open_run

LOSS_FRACTIONS = (0.1, 0.5, 0.9)  # of T: the timesteps whose test loss stands in the table
COLUMNS_SHOWN = 10


def run_study(
    base: Config, varied: dict, runs: dict[str, Config], splits: DataSplits, evaluator: Evaluator | None, device
) -> None:
    """Trains and evaluates every run of a study; finished ones are kept.

    Args:
        base: settings of all runs.
        varied: setting -> its values.
        runs: of `grid_of_runs`.
        splits: the data set.
        evaluator: of samples; None: none are evaluated.
        device: that trains.

    Raises RunError: a run failed; the others have their place in the table.
    """
    if is_main():  # the runs are named, as folders of an earlier call may lie beside them
        write_json(base.run_dir / "study.json", {"varied": varied, "runs": list(runs)})
    failed = {}
    for name, config in runs.items():
        print(f"--- {name}")
        try:
            if is_main():
                config.run_dir.mkdir(parents=True, exist_ok=True)
            diffusor = build_diffusion(config, device)
            model = fit(open_run(config, splits, diffusor))
            if not broadcast_from_main(partial(is_evaluated, config, evaluator), "metrics of an earlier call"):
                write_metrics(evaluate(model, splits, diffusor, config, evaluator), config)
        except RunError as error:
            # Of several processes the others may not know of it; and a signal, where saving failed, ends all.
            if world_size() > 1 or isinstance(error.__context__, Interrupted):
                raise
            failed[name] = str(error)
    if is_main():
        write_comparison(runs, varied, failed, base.run_dir, device)
    if failed:
        raise RunError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))


def grid_of_runs(base: Config, varied: dict[str, list], seeds: int = 1) -> dict[str, Config]:
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
            check_buildable(runs[name])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return runs


def is_evaluated(config: Config, evaluator: Evaluator | None) -> bool:
    """Whether an earlier call already computed the metrics that are asked for now."""
    metrics = config.run_dir / "test_metrics.json"
    saved = max((path.stat().st_mtime for path in checkpoints_in(config.run_dir)), default=0)
    if not metrics.is_file() or metrics.stat().st_mtime < saved:
        return False
    report = read_json(metrics)
    try:
        times, samples = len(report["losses"]["test"]["t"]), report.get("samples", {"by_scale": ()})
        evaluated = {row["guidance_scale"] for row in samples["by_scale"]}
        found = (report["weights"], report["eval_images"], times, bool(evaluated))
    except (KeyError, TypeError):  # of another version
        return False
    wanted = ("ema", config.eval_images, min(config.eval_timesteps, config.timesteps), evaluator is not None)
    if found != wanted or evaluator is None:
        return found == wanted
    same = evaluation_settings(evaluator, config).items() <= samples.items()
    return same and (set(evaluator.scales) <= evaluated or not config.can_guide)


def write_comparison(runs: dict[str, Config], varied: dict[str, list], failed: dict, out: Path, device) -> None:
    """table.csv, table.md, curves.png and samples.png of evaluated runs; those that failed have an empty row.

    table.csv has a row per run and guidance scale, table.md the means over the seeds.
    """
    done = {name: config for name, config in runs.items() if name not in failed}
    reports = {name: read_json(config.run_dir / "test_metrics.json") for name, config in done.items()}
    logs = {name: RunLog.read(config.run_dir / "log.csv") for name, config in done.items()}
    rows = []
    for name, config in runs.items():
        settings = {setting: getattr(config, setting) for setting in (*varied, "seed")}
        metrics = metrics_of(config, reports[name], logs[name]) if name in done else [{}]
        rows += [{**settings, **row} for row in metrics]
    head = max(rows, key=len)
    rows = [{name: row.get(name) for name in head} for row in rows]
    write_atomically(out / "table.csv", as_csv(rows, head).encode())
    notes = [NOT_COMPARABLE, *(f"{name} failed: {reason}" for name, reason in failed.items())]
    text = as_markdown(summarise_seeds(rows, list(varied))) + "\n" + "\n\n".join(notes)
    write_atomically(out / "table.md", (text + "\n").encode())
    if done:
        losses = {name: report["losses"]["test"] for name, report in reports.items()}
        groups = {name: ",".join(f"{s}={getattr(config, s)}" for s in varied) for name, config in done.items()}
        plot_comparison(logs, losses, groups, out / "curves.png")
        first = min(config.seed for config in done.values())
        draw_side_by_side({name: c for name, c in done.items() if c.seed == first}, out / "samples.png", device)
    print(text)


def metrics_of(config: Config, report: dict, log: list[dict]) -> list[dict]:
    """One run's metrics, a row per guidance scale it was evaluated at.

    The losses are l2 on the test set, at the tested timesteps nearest to `LOSS_FRACTIONS` of T.
    """
    losses, metrics = report["losses"]["test"], {}
    for fraction in LOSS_FRACTIONS:
        k = min(range(len(losses["t"])), key=lambda k: abs(losses["t"][k] + 1 - fraction * config.timesteps))
        metrics[f"loss near {fraction:g} T"] = losses["l2"][k]
    metrics["bits/dim"] = min(report["bits_per_dim"][name]["total"] for name in VARIANCES)
    rows = [sample_cells(row) for row in report["samples"]["by_scale"]] if "samples" in report else [{}]
    seconds = {"seconds": round(float(log[-1]["seconds"])) if log else None}
    return [{**metrics, **row, **seconds} for row in rows]


def draw_side_by_side(runs: dict[str, Config], path: Path, device) -> None:
    """A row of samples for every run; a column starts from the same noise, and is of one class where there are any."""
    rows = []
    for config in runs.values():
        checkpoint = load_checkpoint(config.run_dir)
        classes = torch.arange(COLUMNS_SHOWN) % len(checkpoint["class_names"]) if config.class_free_guidance else None
        diffusor, model = build_diffusion(config, device), restore_model(checkpoint, config, device)
        model, how = inference_model(model, config, device), {"classes": classes, **config.sampling}
        batches = sample_in_batches(diffusor, model, COLUMNS_SHOWN, config.sample_batch, config.seed, **how)
        rows.append(torch.cat(list(batches)))
    labels = [name.replace(",", "\n") for name in runs]
    viz.save_grid(torch.cat(rows), path, COLUMNS_SHOWN, labels, title="same noise in every column")
