"""Means and intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

# Student's t, the 97.5% quantile for n seeds: n - 1 degrees of freedom.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
NOT_COMPARABLE = (
    "Raw losses of different schedules or numbers of timesteps are not comparable: at the same t each has another "
    "noise level, and their means weigh the noise levels (log-SNR) differently. Compare the losses at equal log-SNR, "
    "and the samples."
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
