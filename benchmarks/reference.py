"""Writes ex2/evaluation/reference.json, the runs of ours that `ex2/evaluation/sanity.py` compares runs with.

python benchmarks/reference.py shapes=results/quick-1,results/quick "CIFAR-10 photographs=results/photographs"

The names are those of `reference` in `ex2/data/sets.py`.
"""

import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ex2.evaluation.sanity import REFERENCE, images_seen  # noqa: E402
from ex2.machine.files import read_json  # noqa: E402
from ex2.training.log import RunLog  # noqa: E402


def point_of(folder: Path) -> dict:
    """What is kept of a run."""
    config, report = read_json(folder / "config.json"), read_json(folder / "test_metrics.json")
    losses, samples = report["losses"], report.get("samples")
    point = {
        "images": images_seen(config, RunLog.read(folder / "log.csv")),
        "log_snr": losses["test"]["log_snr"],
        "conditional": {"l2": losses["test"]["l2"]},
        "unconditional": {"l2": losses["test_unconditional"]["l2"]},
    }
    if samples:
        own = next(row for row in samples["by_scale"] if row["guidance_scale"] == samples["own_scale"])
        point["samples"] = {name: samples[name] for name in ("features", "count", "own_scale")}
        point["samples"].update({name: own[name] for name in ("frechet_distance", "class_accuracy")})
    return point


def main(arguments: list[str]) -> None:
    reference = {}
    for argument in arguments:
        name, _, folders = argument.partition("=")
        folders = [Path(folder) for folder in folders.split(",")]
        reference[name] = {
            "recorded": date.today().isoformat(),
            "image_size": read_json(folders[0] / "config.json")["image_size"],
            "points": sorted(map(point_of, folders), key=lambda point: point["images"]),
        }
    REFERENCE.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
