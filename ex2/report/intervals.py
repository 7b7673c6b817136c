"""Means and intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Student's t, the 97.5% quantile for n seeds: n - 1 degrees of freedom.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
NOT_COMPARABLE = (
    "Raw losses of different schedules or numbers of timesteps are not comparable: at the same t each has another "
    "noise level, and their means weigh the noise levels (log-SNR) differently. Compare the losses at equal log-SNR, "
    "and the samples."
)


def summarise_seeds(rows: list[dict], varied: Sequence[str]) -> list[dict]:
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
    return [summarise(groups[key], varied, several) for key in sorted(groups, key=lambda key: order.index(key[:-1]))]


def summarise(group: list[dict], varied: Sequence[str], several: bool) -> dict:
    """The row of `summarise_seeds` for runs that differ in their seed alone; "runs" tells how many, of `several`."""
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
