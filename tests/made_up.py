"""Made-up runs: settings, metrics and folders that no training has to make."""

import dataclasses
import json

from PIL import Image

from ex2.settings.config import Config
from ex2.training.log import LOG_COLUMNS

T = [0, 200, 400, 600, 800, 999]
LOG_SNR = [9.0, 3.0, 0.0, -2.5, -5.0, -15.0]
L2 = [0.8, 0.12, 0.04, 0.012, 0.008, 0.006]
PICTURES = "class_grid guidance_grid guidance_curve guidance_exact forward_strip reverse_strip x_zero_strip nearest"
PICTURES = [f"{name}.png" for name in f"{PICTURES} time_embedding schedules training loss_over_t bits_per_dim".split()]
TRAIN, TEST = "python ex2_main.py --preset quick", "python ex2_main.py test --checkpoint results/quick"


def curve(factor=1.0):
    losses = [factor * loss for loss in L2]
    return {
        "t": list(T),
        "log_snr": LOG_SNR,
        "l1": losses,
        "l2": losses,
        "x_zero_l2": [0.01, 0.05, 0.1, 0.2, 0.25, 0.3],
    }


def sample_row(**others):
    return {"count": 500, "frechet_distance": 2.0, "kid": 0.1, "precision": 0.6, "recall": 0.7, **others}


def metrics():
    """The content of test_metrics.json of a run in which all is right."""
    scales = {-1.0: (0.1, 0.9, 9.0), 0.0: (0.9, 0.8, 3.0), 1.0: (0.95, 0.7, 2.0), 3.0: (0.99, 0.4, 4.0)}
    rows = [
        sample_row(guidance_scale=w, class_accuracy=accuracy, recall=recall, frechet_distance=distance)
        for w, (accuracy, recall, distance) in scales.items()
    ]
    pixels = {"median": {"samples": 28.0, "test_images": 25.0}, "fraction_nearer": 0.04}
    bound = {"total": 3.4, "standard_error": 0.1, "decoder": 1.6, "terms": [0.5] * 6}
    made_up = {
        "weights": "ema",
        "classes": 10,
        "parameters": 1404739,
        "losses": {"val": curve(), "test": curve(), "train": curve(0.95), "test_unconditional": curve(1.1)},
        "bits_per_dim": {"images": 128, "t": T, "beta": bound, "beta_tilde": {**bound, "total": 3.3}},
        "samples": {
            "weights": "ema",
            "features": "small classifier",
            "reference": "train and val",
            "sampler": "ddim",
            "steps": 30,
            "count": 500,
            "own_scale": 1.0,
            "by_scale": rows,
            "test_images": sample_row(frechet_distance=0.5, class_accuracy=1.0),
            "noise": sample_row(frechet_distance=90.0),
            "memorisation": {"pixels": pixels},
        },
    }
    made_up["losses"]["optimal"] = curve(0.1)
    return json.loads(json.dumps(made_up))  # no two entries share a list


def log_rows(steps=1000):
    rows = [dict.fromkeys(LOG_COLUMNS, "") for _ in range(3)]
    for i, row in enumerate(rows, 1):
        row.update(step=str(i * steps // 3 if i < 3 else steps), epoch=str(i), seconds=str(20.0 * i), val_loss="0.1")
        row["epoch_loss"] = "0.05"
    return rows


def config(**changes):
    return Config(**{"dataset": "shapes", "class_free_guidance": True, "schedule": "cosine", **changes})


def make_run(folder, report=None, pictures=(*PICTURES, "reverse.gif", "forward.gif", "guidance.gif"), **changes):
    """A folder as a training and a `test` leave it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config(**changes))))
    (folder / "test_metrics.json").write_text(json.dumps(metrics() if report is None else report))
    lines = [",".join(LOG_COLUMNS), *(",".join(row.values()) for row in log_rows())]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "commands.txt").write_text(f"{TRAIN} --run_name {folder.name}\n{TEST}\n")
    for name in pictures:
        frames = [Image.new("RGB", (6, 4), (40 * i, 0, 200)) for i in range(5)]
        animation = {"save_all": True, "append_images": frames[1:]} if name.endswith(".gif") else {}
        frames[0].save(folder / name, **animation)
    return folder


def make_study(folder, setting, reports, **changes):
    """A comparison of one setting, value -> metrics; None for a run that failed."""
    folder.mkdir(parents=True)
    for value, report in reports.items():
        settings = {setting: value, **changes}
        make_run(folder / f"{setting}={value}", {} if report is None else report, (), **settings)
    plan = {"varied": {setting: list(reports)}, "runs": [f"{setting}={value}" for value in reports]}
    (folder / "study.json").write_text(json.dumps(plan))
    (folder / "commands.txt").write_text(f"python ex2_main.py compare --vary {setting}=a,b\n")
    for name in ("samples.png", "curves.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder
