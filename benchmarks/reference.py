"""Writes ex2_reference.json, the curves that `ex2_normal` compares runs with, from runs of ours that were tested.

python benchmarks/reference.py shapes=results/quick-1,results/quick "CIFAR-10 photographs=results/photographs"
"""

import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ex2.evaluation.sanity import REFERENCE, images_seen  # noqa: E402
from ex2.machine.files import read_json  # noqa: E402
from ex2.training.log import RunLog  # noqa: E402

DATASETS = {"shapes": ["shapes"], "CIFAR-10 photographs": ["cifar10", "folder"]}


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
        kind, _, folders = argument.partition("=")
        folders = [Path(folder) for folder in folders.split(",")]
        reference[kind] = {
            "recorded": date.today().isoformat(),
            "datasets": DATASETS[kind],
            "image_size": read_json(folders[0] / "config.json")["image_size"],
            "points": sorted(map(point_of, folders), key=lambda point: point["images"]),
        }
    REFERENCE.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
