"""Metrics as tables, for people: of a run, of its samples, and of runs with several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

INCEPTION = "Inception v3 (FID)"  # description of the features on which a Fréchet distance is called FID
VARIANCES = ("beta", "beta_tilde")  # sigma^2 of the reverse process, as in test_metrics.json
# Student's t, the 97.5% quantile for n seeds: n - 1 degrees of freedom.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
NOT_COMPARABLE = (
    "Raw losses of different schedules or numbers of timesteps are not comparable: at the same t each has another "
    "noise level, and their means weigh the noise levels (log-SNR) differently. Compare the losses at equal log-SNR, "
    "and the samples."
)


def format_cell(value) -> str:
    """A cell of a table: fractions to four digits, whole numbers as they are, a dash where there is none."""
    if value is None or value == "":
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"


def as_markdown(rows: Sequence[Mapping]) -> str:
    """A Markdown table with padded columns. The keys of the first row are its head."""
    lines = [list(rows[0]), *([format_cell(cell) for cell in row.values()] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, cells, widths))} |\n" for cells in lines)


def print_losses(report: dict) -> None:
    """The losses as a table, a row per timestep; below it bits per dimension, and the class accuracy, if any."""
    losses = report["losses"]
    columns = [("val", "l1"), ("val", "l2"), ("test", "l1"), ("test", "l2")]
    columns += [(name, "l2") for name in ("test_unconditional", "train", "optimal") if name in losses]
    rows = [{"t": t + 1} for t in losses["val"]["t"]]
    for name, loss in columns:
        for row, value in zip(rows, losses[name][loss]):
            row[f"{name.replace('_', ' ')} {loss}"] = value
    print(f"loss of the predicted noise\n{as_markdown(rows)}", end="")
    vlb = report["bits_per_dim"]
    for name in VARIANCES:
        error = vlb[name]["standard_error"]
        spread = "" if error is None else f" +- {error:.3f}"
        print(f"bits/dim of {vlb['images']} test images, sigma^2 = {name}: {vlb[name]['total']:.3f}{spread}")
    if "class_accuracy" in report:
        found = report["class_accuracy"]
        print(f"{found['accuracy']:.1%} of {found['samples']} samples show their class")


def sample_cells(row: Mapping) -> dict:
    """The metrics of samples at a guidance scale, an entry of "by_scale", as cells of a study's table."""
    columns = {"w": "guidance_scale", "Fréchet distance": "frechet_distance", "precision": "precision"}
    columns.update({"recall": "recall", "class accuracy": "class_accuracy"})
    return {head: row.get(key) for head, key in columns.items()}


def samples_table(samples: dict) -> list[dict]:
    """The metrics of test images, of samples at each scale and of noise, as rows."""
    name = "FID" if samples["features"] == INCEPTION else "Fréchet distance"
    columns = {name: "frechet_distance", "KID": "kid", "precision": "precision", "recall": "recall"}
    columns["class accuracy"] = "class_accuracy"
    entries = [(f"{samples['test_images']['count']} test images", samples["test_images"])]
    entries += [(f"samples, w = {row['guidance_scale']:g}", row) for row in samples["by_scale"]]
    entries.append(("noise", samples["noise"]))
    return [{"images": title, **{head: row.get(key) for head, key in columns.items()}} for title, row in entries]


def print_samples(samples: dict) -> None:
    """The metrics of samples as a table, a row per guidance scale, between test images and noise."""
    made_with = f"{samples['weights']} weights, {samples['sampler']}, {samples['steps']} steps"
    print(f"{samples['count']} samples per scale ({made_with}) against {samples['reference']}")
    print(f"features: {samples['features']}\n{as_markdown(samples_table(samples))}", end="")
    pixels = samples["memorisation"]["pixels"]
    print(
        f"nearest training image, in grey levels: {pixels['median']['samples']:.1f} from samples and "
        f"{pixels['median']['test_images']:.1f} from test images (medians);\n"
        f"{pixels['fraction_nearer']:.0%} of samples are nearer than 95% of test images (see nearest.png)"
    )


def summarise_seeds(rows: Sequence[Mapping], varied: Sequence[str]) -> list[dict]:
    """One row per combination and guidance scale: means over the seeds, with 95% intervals ("mean ± half its width").

    Args:
        rows: settings and metrics of a run, at one guidance scale "w"; a run that failed has no "bits/dim".
        varied: the settings that were varied.
    """
    done = {tuple(row[name] for name in varied) for row in rows if row["bits/dim"] is not None}
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        setting = tuple(row[name] for name in varied)
        if row["bits/dim"] is not None or setting not in done:
            groups.setdefault((setting, row.get("w")), []).append(row)
    summary = []
    for (setting, w), group in groups.items():
        summary.append(dict(zip(varied, setting)))
        if len({row.get("seed") for row in rows}) > 1:
            summary[-1]["runs"] = sum(row["bits/dim"] is not None for row in group)
        for name in [name for name in group[0] if name not in (*varied, "seed")]:
            values = [row[name] for row in group if row[name] not in (None, "")]
            summary[-1][name] = w if name == "w" else mean_and_interval(values)
    return summary


def mean_and_interval(values: Sequence[float]) -> float | str | None:
    """The mean; from two values on as text, with `half_width`."""
    if len(values) < 2:
        return values[0] if values else None
    return f"{statistics.mean(values):.3g} ± {half_width(values):.2g}"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean of two values or more, by Student's t."""
    return T_QUANTILES.get(len(values), T_QUANTILES[10]) * statistics.stdev(values) / len(values) ** 0.5
