"""Metrics as tables, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

INCEPTION = "Inception v3 (FID)"  # description of the features on which a Fréchet distance is called FID
VARIANCES = ("beta", "beta_tilde")  # sigma^2 of the reverse process, as in test_metrics.json


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
