"""What the runs and studies under `results/` have to say to each sub-task: sentences, metrics, pictures (2.1 to 2.5).

All sentences are computed from the metrics; what is missing is named with the command that makes it.
"""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from ex2.evaluation.sanity import loss_at, verdict
from ex2.evaluation.tables import samples_table
from ex2.machine.files import read_commands
from ex2.report.intervals import NOT_COMPARABLE, half_width, mean_and_interval, summarise_seeds
from ex2.settings.config import config_of
from ex2.training.log import RunLog

CLEAR = 1.05  # ratio of two figures of single runs from which on one is called smaller: less is chance
CAPTIONS = {
    "time_embedding.png": "Each row is a sine or cosine of the time, from fast (top) to slow: no two times look alike.",
    "training.png": "Left: the loss falls steeply at first, then slowly. Middle: the learning rate rises, then falls "
    "to zero. Right: the size of the gradient.",
    "forward.gif": "forward process (turned round here): images of the test set and their noise",
    "reverse.gif": "reverse process: what the model makes of noise",
    "forward_strip.png": "Forward process: noise is added from left to right, until nothing of the image is left.",
    "reverse_strip.png": "Reverse process: the model removes a little noise at a time; large forms come first.",
    "x_zero_strip.png": "The model's estimate of x_0 at each t: at T clamped noise, then a mean of images, then one.",
    "nearest.png": "Top: samples. Below each: the training image that is nearest to it, by pixels and by features.",
    "loss_over_t.png": "Loss over the time: little noise (left) is hard to tell from the image's own detail, much is "
    "easy. Dotted: a run of ours, to compare with.",
    "bits_per_dim.png": "Bits per dimension: most of the bound is spent on the last details, at small t.",
    "schedules.png": "Left: the noise a step adds. Middle: what is left of the image, longest with cosine; right: its "
    "log-SNR.",
    "samples.png": "Samples.",
    "class_grid.png": "Samples of every class, a row for each.",
    "guidance.gif": "one sample per class, from the same noise at every w",
    "guidance_grid.png": "The same noise at growing w: at w = -1 the class has no say, from w = 1 on it decides.",
    "guidance_curve.png": "More guidance: more samples show their class (left), but they differ less (recall, middle).",
    "study/samples.png": "Samples of every setting, a row for each; a column starts from the same noise.",
    "study/curves.png": "Losses over the steps and, right, over the noise level: there schedules can be compared.",
}
FLOOR = (
    " Dashed: the floor, the loss of a predictor that knows all training images by heart. On average over them no "
    "model is below it; one that comes near it there, but not on test images, has learnt them by heart as well."
)


@dataclass(frozen=True)
class Run:
    """A trained run: its folder, its settings, and its figures, which are empty where it was not tested."""

    folder: Path
    config: dict
    report: dict

    @property
    def log(self) -> list[dict]:
        """The rows of its log.csv; none where there is no such file."""
        return RunLog.read(self.folder / "log.csv")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def can_guide(self) -> bool:
        return self.config["class_free_guidance"] and self.config["p_uncond"] > 0

    @property
    def may_show_data(self) -> bool:
        """Whether pictures of the data set belong to the page: photographs may have terms that forbid it."""
        return self.config["dataset"] == "shapes"

    def command(self, tested: bool = False) -> str:
        """The latest command that trained the run, or that judged its samples; "" where it is not known."""
        known = [line for line in read_commands(self.folder) if "--eval_samples 0" not in line]
        return next((line for line in reversed(known) if line.startswith("python ex2_main.py test ") == tested), "")

    @property
    def test_again(self) -> str:
        """The command that makes missing figures."""
        return f"python ex2_main.py test --checkpoint {shlex.quote(self.folder.as_posix())}"


@dataclass(frozen=True)
class Study:
    """A comparison: its folder, what it varied, its table (column -> cell, as text) and its tested runs."""

    folder: Path
    varied: list[str]
    rows: list[dict[str, str]]
    runs: list[Run]


@dataclass
class Part:
    """What one run or study has to say to one sub-task."""

    title: str
    sentences: list[str] = field(default_factory=list)
    table: list[dict] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)  # (file, what it shows)
    animations: list[tuple[Path, str]] = field(default_factory=list)  # they share a slider
    commands: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # (what, command that makes it)

    @property
    def is_empty(self) -> bool:
        return not (self.sentences or self.pictures or self.animations or self.missing)

    def show(self, path: Path, command: str, needed: bool = True, caption: str = "", again: str = "") -> None:
        """Adds a picture, made by `command`. If a needed one is not there, says which command makes it (`again`)."""
        caption = caption or CAPTIONS[path.name]
        if is_picture(path):
            (self.animations if path.suffix == ".gif" else self.pictures).append((path, caption))
            self.commands += [command] if command and command not in self.commands else []
        elif needed:
            again = again or command or "the command that trained it"
            self.missing.append((f"{path.name}: {caption.rstrip('. ')}", again))


def is_picture(path: Path) -> bool:
    """Whether a file is there and whole, with all its frames."""
    try:
        imageio.imread(path, index=None)
    except Exception:  # many kinds for damaged files
        return False
    return True


def network_part(run: Run) -> Part:
    """2.1: what was trained, on what, for how long."""
    config, rows, part = run.config, run.log, Part(run.name)
    part.sentences.append(
        f"{'Class-conditional' if config['class_free_guidance'] else 'Unconditional'} attention U-Net "
        f"(dim {config['dim']}, multipliers {', '.join(map(str, config['dim_mults']))}) on {config['dataset']} at "
        f"{config['image_size']}x{config['image_size']}; {config['timesteps']} timesteps of the {config['schedule']} "
        f"schedule; AdamW at a peak learning rate of {config['lr']:g}, {config['loss_type']} loss, "
        f"{config['batch_size']} images per step."
    )
    if rows:
        steps, minutes = int(rows[-1]["step"]), float(rows[-1]["seconds"]) / 60
        images = steps * config["batch_size"]
        part.sentences.append(f"Training: {steps:,} steps, {images:,} images, in {minutes:.1f} minutes.")
    note = run.folder / "note.txt"  # the user's own words on the run
    if note.is_file():
        part.sentences.append(" ".join(note.read_text(encoding="utf-8", errors="replace").split()))
    part.show(run.folder / "training.png", run.command())
    return part


def network_answer(run: Run) -> str:
    """2.1 in a sentence."""
    return (
        f"A U-Net of {run.report['parameters']:,} parameters predicts the noise in x_t. It is told the time t as "
        f"sines and cosines of {run.config['dim'] // 2} frequencies, which an MLP turns into a scale and a shift for "
        "every residual block."
    )


def process_part(run: Run) -> Part:
    """2.2 a-d, f: forward and reverse process as pictures."""
    part = Part(run.name)
    part.show(run.folder / "forward_strip.png", run.command(), run.may_show_data)
    for name in ("reverse_strip", "x_zero_strip", *(() if run.config["class_free_guidance"] else ("samples",))):
        part.show(run.folder / f"{name}.png", run.command())
    return part


def side_by_side(title: str, runs: list[Run], films: tuple[str, ...]) -> Part:
    """2.2 f, 2.4 c: animations of all runs, which share a slider."""
    part = Part(title)
    for run in runs:
        needed = {"forward.gif": run.may_show_data, "guidance.gif": run.can_guide}
        for name in films:
            caption = f"{run.name}, {CAPTIONS[name]}"
            part.show(run.folder / name, run.command(), needed.get(name, True), caption)
    part.commands = []  # each run's part has them
    return part


def process_answer(run: Run) -> str:
    """2.2 a-d, f in a sentence."""
    left = 1 / (1 + math.exp(-run.report["losses"]["test"]["log_snr"][-1]))
    steps = run.config["sample_steps"] or run.config["timesteps"]
    return (
        f"After {run.config['timesteps']} steps of Eq. 2 a share of {left:.1g} of the image's variance is left "
        f"(alpha-bar of Eq. 4), so x_T is noise; the reverse process goes back from it to an image, here in {steps} "
        "steps."
    )


def quality_part(run: Run) -> Part:
    """2.2 e: losses, bits per dimension, figures of samples."""
    part, report = Part(run.name), run.report
    command, again = run.command(tested=True), run.test_again
    if not report:
        part.missing.append(("the figures of this run, or those of this version", again))
        return part
    part.sentences += losses_sentences(report)
    if "samples" in report:
        part.sentences += samples_sentences(report["samples"])
        part.table = samples_table(report["samples"])
        part.show(run.folder / "nearest.png", command, run.may_show_data, again=again)
    else:
        part.missing.append(("figures of samples (Fréchet distance, precision and recall)", again))
    part.sentences.append(f"Is this normal? {' '.join(verdict(run.config, report, run.log))}")
    caption = CAPTIONS["loss_over_t.png"] + (FLOOR if "floor" in report["losses"] else "")
    part.show(run.folder / "loss_over_t.png", command, caption=caption, again=again)
    part.show(run.folder / "bits_per_dim.png", command, again=again)
    return part


def losses_sentences(report: dict) -> list[str]:
    """What losses and bound say."""
    test, val, bound = report["losses"]["test"], report["losses"]["val"], report["bits_per_dim"]
    said = []
    if len(test["t"]) > 1:
        hard, easy = int(np.argmax(test["l2"])), int(np.argmin(test["l2"]))
        said.append(
            f"The noise is hardest to tell at t = {test['t'][hard] + 1} (l2 loss {test['l2'][hard]:.3g}, where a guess "
            f"of zero has 1) and easiest at t = {test['t'][easy] + 1} ({test['l2'][easy]:.2g})."
        )
    gap = np.mean(val["l2"]) / np.mean(test["l2"]) - 1
    name = min(("beta", "beta_tilde"), key=lambda name: bound[name]["total"])
    return [
        *said,
        f"The mean validation loss differs from the mean test loss by {abs(gap):.1%}.",
        f"The variational bound is {bound[name]['total']:.2f} bits per dimension at best (sigma^2 = {name}, "
        f"{bound['images']} test images); {bound[name]['decoder'] / bound[name]['total']:.0%} of it is the last step.",
    ]


def quality_answer(run: Run) -> str:
    """2.2 e in a sentence."""
    samples = run.report["samples"]
    own = next(row for row in samples["by_scale"] if row["guidance_scale"] == samples["own_scale"])
    accuracy = f"; {own['class_accuracy']:.0%} of the samples show their class" if "class_accuracy" in own else ""
    return (
        f"On {run.name} the l2 loss of test images is {np.mean(run.report['losses']['test']['l2']):.3g} in the mean "
        f"over t, and the samples have a Fréchet distance of {own['frechet_distance']:.3g} to the training images, "
        f"where test images have {samples['test_images']['frechet_distance']:.3g}{accuracy}."
    )


def samples_sentences(samples: dict) -> list[str]:
    """What the samples were compared by, and whether they are copies."""
    pixels = samples["memorisation"]["pixels"]
    copies = "look for copies in the picture" if pixels["share_nearer"] > 0.2 else "no sign of copying"
    return [
        f"At each w {samples['count']} samples of the {samples['weights']} weights are compared with training images "
        f"(features: {samples['features']}).",
        f"The nearest training image is {pixels['median']['samples']:.1f} grey levels from a sample and "
        f"{pixels['median']['test_images']:.1f} from a test image (medians), and {pixels['share_nearer']:.0%} of the "
        f"samples are nearer than 95% of test images: {copies}.",
    ]


def guidance_part(run: Run) -> Part:
    """2.4: samples by class and what the guidance scale does."""
    part = Part(run.name)
    part.show(run.folder / "class_grid.png", run.command())
    if run.can_guide:
        part.show(run.folder / "guidance_grid.png", run.command())
        part.show(run.folder / "guidance_curve.png", run.command(tested=True), again=run.test_again)
    return part


def guidance_answer(run: Run) -> str:
    """2.4 in a sentence."""
    rows = {row["guidance_scale"]: row for row in run.report["samples"]["by_scale"]}
    best, none, most = max(rows.values(), key=lambda row: row["class_accuracy"]), rows[-1.0], rows[max(rows)]
    changes = "falls" if most["recall"] < best["recall"] else "does not fall"
    return (
        f"On {run.name}, {best['class_accuracy']:.0%} of the samples show their class at w = "
        f"{best['guidance_scale']:g}, {none['class_accuracy']:.0%} without the class (w = -1); recall, which measures "
        f"variety, {changes} from {best['recall']:.2f} there to {most['recall']:.2f} at w = {max(rows):g}."
    )


def butterflies_part(run: Run) -> Part:
    """2.5: what the butterflies look like."""
    part = Part(run.name, [f"At {run.config['image_size']} pixels; the sections above have its figures."])
    part.show(run.folder / ("class_grid.png" if run.config["class_free_guidance"] else "samples.png"), run.command())
    return part


def butterflies_answer(run: Run) -> str:
    """2.5 in a sentence."""
    images = int(run.log[-1]["step"]) * run.config["batch_size"]
    given = "conditional on the species" if run.config["class_free_guidance"] else "unconditional"
    return (
        f"A model {given} at {run.config['image_size']}x{run.config['image_size']} pixels has a mean l2 loss of "
        f"{np.mean(run.report['losses']['test']['l2']):.3g} on test images after a training on {images:,} images; its "
        "samples are below."
    )


def study_part(study: Study) -> Part:
    """2.2 training, 2.3, 2.4: which of the compared settings won, by how much and where."""
    part = Part(f"{study.folder.name}: {', '.join(study.varied)} compared")
    for row in summarise_seeds(study.rows, study.varied):  # table.md has the other columns
        part.table.append({name: cell for name, cell in row.items() if "loss" not in name and name != "seconds"})
    part.sentences += [study_answer(study), *loss_sentences(study)]
    if {"schedule", "timesteps"} & set(study.varied):
        part.sentences.append(NOT_COMPARABLE)
    command = (read_commands(study.folder) or [""])[-1]
    for name in ("samples.png", "curves.png"):
        part.show(study.folder / name, command, caption=CAPTIONS[f"study/{name}"])
    return part


def study_answer(study: Study) -> str:
    """Which settings have the smallest Fréchet distance; bits per dimension where no samples were judged."""
    criterion = "Fréchet distance" if any(row.get("Fréchet distance") for row in study.rows) else "bits/dim"
    scales = {row.get("w") for row in study.rows}
    own = str(config_of({"config": study.runs[0].config}, {}).sampling["guidance_scale"]) if len(scales) > 1 else None
    values: dict[str, dict] = {}
    for row in study.rows:
        if row.get(criterion) and own in (None, row.get("w")):
            setting = ", ".join(f"{name} {row[name]}" for name in study.varied)
            values.setdefault(setting, {})[row.get("seed")] = float(row[criterion])
    return contest(values, criterion)


def loss_sentences(study: Study) -> list[str]:
    """Which settings have the smallest test loss at noise levels that all runs know."""
    curves = [(run, run.report["losses"]["test"]) for run in study.runs]
    low = max(min(curve["log_snr"]) for _, curve in curves)
    high = min(max(curve["log_snr"]) for _, curve in curves)
    said = []
    for log_snr in (-2, 2):
        values: dict[str, dict] = {}
        for run, curve in curves if low <= log_snr <= high else ():
            setting = ", ".join(f"{name} {run.config[name]}" for name in study.varied)
            values.setdefault(setting, {})[run.config["seed"]] = loss_at(curve, log_snr)
        said.append(contest(values, f"test l2 loss at log-SNR {log_snr}"))
    return [sentence for sentence in said if sentence]


def contest(values: dict[str, dict], what: str) -> str:
    """Which setting has the smallest mean, and which other settings differ from it by more than chance.

    Args:
        values: setting -> {seed: figure}. Differences are taken seed by seed, as runs of one seed start from the same
            weights and noise; seeds that not all settings have are left out.
    """
    if len(values) < 2:
        return ""
    seeds = [seed for seed in next(iter(values.values())) if all(seed in of_seed for of_seed in values.values())]
    if not seeds:
        return ""
    values = {name: [of_seed[seed] for seed in seeds] for name, of_seed in values.items()}
    best, *rest = sorted(values, key=lambda name: statistics.mean(values[name]))
    what = f"{what[0].upper()}{what[1:]}"
    if len(seeds) == 1:
        others = ", ".join(f"{values[name][0]:.4g} for {name}" for name in rest)
        if values[rest[0]][0] < CLEAR * values[best][0]:
            others += ", so that the first two don't differ clearly"
        return f"{what}: smallest for {best} ({values[best][0]:.4g}), {others}; each figure is of a single run."
    gaps = {name: [value - least for value, least in zip(values[name], values[best])] for name in rest}
    larger = [name for name in rest if statistics.mean(gaps[name]) > half_width(gaps[name])]
    said = f"{what}: smallest for {best} ({mean_and_interval(values[best])}, mean of {len(seeds)} seeds, 95% interval)"
    for names, how in (larger, "larger"), ([name for name in rest if name not in larger], "not clearly larger"):
        differences = [f"{name} (by {mean_and_interval(gaps[name])})" for name in names]
        said += f"; {how} for {' and '.join(differences)}" if names else ""
    return f"{said}."
