"""What the runs and studies under `results/` have to say to each sub-task: sentences, figures, pictures (2.1 to 2.5).

All sentences are computed from the figures; what is missing is named with the command that makes it.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from ex2_checkpoint import RunLog
from ex2_cli import PRESETS
from ex2_compare import NOT_COMPARABLE, half_width, mean_and_interval, over_seeds
from ex2_config import Config, config_of
from ex2_normal import loss_at, verdict

CLEAR = 1.05  # ratio of two figures of single runs from which on one is called smaller: less is chance
PROCESS_FILMS = {
    "forward.gif": "forward process (turned round here): images of the test set and their noise",
    "reverse.gif": "reverse process: what the model makes of noise",
}
GUIDANCE_FILMS = {"guidance.gif": "one sample per class, from the same noise at every w"}
NOT_IN_COMMANDS = ("cuda", "resume", "allow_changes", "num_threads", "dry_run", "log_interval")


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

    def add_picture(self, path: Path, shows: str, command: str, needed: bool = True) -> None:
        """Puts the picture in or, where it is needed, says what makes it."""
        kind = self.animations if path.suffix == ".gif" else self.pictures
        if is_picture(path):
            kind.append((path, shows))
            self.commands += [command] if command and command not in self.commands else []
        elif needed:
            self.missing.append((f"{path.name}: {shows.rstrip('. ')}", command))


def is_picture(path: Path) -> bool:
    """Whether a file is there and whole, with all its frames."""
    try:
        imageio.imread(path, index=None)
    except Exception:  # many kinds for damaged files
        return False
    return True


def figure(value) -> str:
    """A cell of a table: fractions to four digits, whole numbers as they are, a dash where there is none."""
    if value is None or value == "":
        return "-"
    try:
        number = float(value)
    except ValueError:
        return str(value)
    if not math.isfinite(number):
        return str(value)
    return f"{number:.0f}" if number == round(number) or abs(number) >= 1000 else f"{number:.4g}"


def test_command(run: Run) -> str:
    """The command that tests a run."""
    samples = run.report.get("samples", {})
    scales = [f"{row['guidance_scale']:g}" for row in samples.get("by_scale", ())]
    flags = f" --eval_samples {samples['count']}" if samples else ""
    flags += f" --eval_scales {' '.join(scales)}" if len(scales) > 1 else ""
    own = run.config["sample_steps"] or run.config["timesteps"]
    flags += f" --sample_steps {samples['steps']}" if samples.get("steps", own) != own else ""
    return f"python ex2_main.py test --checkpoint {shlex.quote(run.folder.as_posix())}{flags}"


def train_command(run: Run) -> str:
    """The command that trains and draws a run: its settings where they are not the default."""
    settings = settings_of(run.config)
    for preset, config in PRESETS.items():
        if settings == settings_of(vars(config)):
            return f"python ex2_main.py --preset {preset}"
    # Defaults can depend on the data set, which is itself named where it is not the default one.
    default, flags = {**vars(Config(dataset=run.config["dataset"])), "dataset": Config().dataset}, []
    for name, value in settings.items():
        if value is None or value == default[name]:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            texts = map(str, value) if isinstance(value, tuple) else [str(value)]
            flags.append(f"--{name} {' '.join(map(shlex.quote, texts))}")
    return f"python ex2_main.py {' '.join(flags)}"


def settings_of(config: dict) -> dict:
    """The settings that belong into a command, as `Config` has them: JSON has lists for tuples."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return {name: value for name, value in settings.items() if name not in NOT_IN_COMMANDS}


def compare_command(study: Study) -> str:
    """The command of a study."""
    values = {name: dict.fromkeys(row[name] for row in study.rows) for name in study.varied}
    first = study.runs[0]
    own = {**first.config, "data_seed": None, "results_dir": Config.results_dir}
    base = f"python ex2_main.py compare {train_command(dataclasses.replace(first, config=own)).split(' ', 2)[2]}"
    for preset, config in PRESETS.items():
        same = {**own, **{name: getattr(config, name) for name in (*study.varied, "run_name", "seed")}}
        if settings_of(same) == settings_of(vars(config)):
            base = f"python ex2_main.py compare --preset {preset}"
    vary = "".join(f" --vary {name}={','.join(values[name])}" for name in study.varied)
    seeds = len({row.get("seed") for row in study.rows})
    counts = {run.report["samples"]["count"] for run in study.runs if "samples" in run.report}
    scales = list(dict.fromkeys(f"{float(row['w']):g}" for row in study.rows if row.get("w")))
    flags = f" --seeds {seeds}" if seeds > 1 else ""
    flags += f" --eval_samples {max(counts, default=0)}"
    flags += f" --eval_scales {' '.join(scales)}" if len(scales) > 1 else ""
    return f"{base}{vary}{flags}"


# ---------------------------------------------------------------------------- 2.1, 2.2: a run


def network_part(run: Run) -> Part:
    """2.1: what was trained, on what, for how long."""
    config, part, train = run.config, Part(run.name), train_command(run)
    size, rows = config["image_size"], run.log
    part.sentences.append(
        f"{'Class-conditional' if config['class_free_guidance'] else 'Unconditional'} attention U-Net "
        f"(dim {config['dim']}, multipliers {', '.join(map(str, config['dim_mults']))}) on {config['dataset']} at "
        f"{size}x{size}; {config['timesteps']} timesteps of the {config['schedule']} schedule; AdamW at a peak "
        f"learning rate of {config['lr']:g}, {config['loss_type']} loss, {config['batch_size']} images per step."
    )
    if rows:
        last = rows[-1]
        part.sentences.append(
            f"Training: {int(last['step']):,} steps, {int(last['step']) * config['batch_size']:,} images, in "
            f"{float(last['seconds']) / 60:.1f} minutes."
        )
    note = run.folder / "note.txt"  # the user's own words on the run
    if note.is_file():
        part.sentences.append(" ".join(note.read_text(encoding="utf-8", errors="replace").split()))
    shows = "Left: the loss falls steeply at first, then slowly. Middle: the learning rate rises, then falls to zero. "
    part.add_picture(run.folder / "training.png", shows + "Right: the size of the gradient.", train)
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
    part, train, data = Part(run.name), train_command(run), run.may_show_data
    shows = "Forward process: noise is added from left to right, until nothing of the image is left."
    part.add_picture(run.folder / "forward_strip.png", shows, train, data)
    shows = "Reverse process: from noise (left) the model removes a little noise at a time; large forms come first."
    part.add_picture(run.folder / "reverse_strip.png", shows, train)
    shows = "The model's estimate of x_0 at each t: a mean of many images at first, then one of them."
    part.add_picture(run.folder / "x_zero_strip.png", shows, train)
    if not run.config["class_free_guidance"]:
        part.add_picture(run.folder / "samples.png", "Samples.", train)
    return part


def side_by_side(title: str, runs: list[Run], films: dict[str, str]) -> Part:
    """2.2 f, 2.4 c: animations of all runs, file -> what it shows, which share a slider."""
    part = Part(title)
    for run in runs:
        needed = {"forward.gif": run.may_show_data, "guidance.gif": run.can_guide}
        for name, shows in films.items():
            part.add_picture(run.folder / name, f"{run.name}, {shows}", train_command(run), needed.get(name, True))
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
    part, report, test_again = Part(run.name), run.report, test_command(run)
    if not report:
        part.missing.append(("the figures of this run, or those of this version", test_again))
        return part
    part.sentences += losses_sentences(report)
    if "samples" in report:
        part.sentences += samples_sentences(report["samples"])
        part.table = samples_table(report["samples"])
        shows = "Top: samples. Below each: the training image that is nearest to it, by pixels and by features."
        part.add_picture(run.folder / "nearest.png", shows, test_again, run.may_show_data)
    else:
        part.missing.append(("figures of samples (Fréchet distance, precision and recall)", test_again))
    part.sentences.append(f"Is this normal? {' '.join(verdict(run.config, report, run.log))}")
    shows = "Loss over the time: little noise (left) is hard to tell from the image's own detail, much noise is easy. "
    if "floor" in report["losses"]:
        shows += (
            "Dashed: the floor, the loss of a predictor that knows all training images by heart. On average over the "
            "training images no model is below it; one that comes near it there, but not on test images, has learnt "
            "them by heart as well. "
        )
    part.add_picture(run.folder / "loss_over_t.png", shows + "Dotted: a run of ours, to compare with.", test_again)
    shows = "Bits per dimension: most of the bound is spent on the last details, at small t."
    part.add_picture(run.folder / "bits_per_dim.png", shows, test_again)
    return part


def losses_sentences(report: dict) -> list[str]:
    """What losses and bound say."""
    test, val, bound = report["losses"]["test"], report["losses"]["val"], report["bits_per_dim"]
    said = [f"Figures are of the {report['weights']} weights."]
    if len(test["t"]) > 1:
        hard, easy = int(np.argmax(test["l2"])), int(np.argmin(test["l2"]))
        said.append(
            f"The noise is hardest to tell at t = {test['t'][hard] + 1} (l2 loss {test['l2'][hard]:.3g}, where a guess "
            f"of zero has 1) and easiest at t = {test['t'][easy] + 1} ({test['l2'][easy]:.2g})."
        )
    gap = np.mean(val["l2"]) / np.mean(test["l2"]) - 1
    said.append(f"The mean validation loss differs from the mean test loss by {abs(gap):.1%}.")
    name = min(("beta", "beta_tilde"), key=lambda name: bound[name]["total"])
    said.append(
        f"The variational bound is {bound[name]['total']:.2f} bits per dimension at best (sigma^2 = {name}, "
        f"{bound['images']} test images); {bound[name]['decoder'] / bound[name]['total']:.0%} of it is the last step."
    )
    return said


def quality_answer(run: Run) -> str:
    """2.2 e in a sentence."""
    own = row_of(run.report["samples"])
    test = run.report["samples"]["test_images"]
    accuracy = f"; {own['class_accuracy']:.0%} of the samples show their class" if "class_accuracy" in own else ""
    return (
        f"On {run.name} the l2 loss of test images is {np.mean(run.report['losses']['test']['l2']):.3g} in the mean "
        f"over t, and the samples have a Fréchet distance of {own['frechet_distance']:.3g} to the training images, "
        f"where test images have {test['frechet_distance']:.3g}{accuracy}."
    )


def row_of(samples: dict) -> dict:
    """The figures at the run's own guidance scale."""
    return next(row for row in samples["by_scale"] if row["guidance_scale"] == samples["own_scale"])


def samples_sentences(samples: dict) -> list[str]:
    """What the figures of samples say."""
    row = row_of(samples)
    said = []
    if row["frechet_distance"] is not None:
        near, far = samples["test_images"]["frechet_distance"], samples["noise"]["frechet_distance"]
        floor = "" if near is None else f"{near:.3g} for {samples['test_images']['count']} test images, "
        said.append(
            f"The Fréchet distance of {samples['count']} samples at w = {row['guidance_scale']:g} to the training "
            f"images is {row['frechet_distance']:.3g} ({floor}{far:.3g} for noise; features: {samples['features']})."
        )
    pixels = samples["memorisation"]["pixels"]
    copies = "look for copies in the picture" if pixels["share_nearer"] > 0.2 else "no sign of copying"
    said.append(
        f"The nearest training image is {pixels['median']['samples']:.1f} grey levels from a sample and "
        f"{pixels['median']['test_images']:.1f} from a test image (medians), and {pixels['share_nearer']:.0%} of the "
        f"samples are nearer than 95% of test images: {copies}."
    )
    return said


def samples_table(samples: dict) -> list[dict]:
    """The figures of test images, of samples at each scale and of noise, as rows."""
    entries = [("test images", samples["test_images"])]
    entries += [(f"samples, w = {row['guidance_scale']:g}", row) for row in samples["by_scale"]]
    names = ("frechet_distance", "kid", "precision", "recall", "class_accuracy")
    head = ("Fréchet distance", "KID", "precision", "recall", "class accuracy")
    return [
        {"images": title, **{label: row.get(name) for label, name in zip(head, names)}}
        for title, row in (*entries, ("noise", samples["noise"]))
    ]


# ---------------------------------------------------------------------------- 2.4, 2.5: classes


def guidance_part(run: Run) -> Part:
    """2.4: samples by class and what the guidance scale does."""
    part, train = Part(run.name), train_command(run)
    part.add_picture(run.folder / "class_grid.png", "Samples of every class, a row for each.", train)
    if run.can_guide:
        part.sentences += guidance_sentences(run.report.get("samples", {}).get("by_scale", []))
        shows = "The same noise at growing w: at w = -1 the class has no say, from w = 1 on it decides."
        part.add_picture(run.folder / "guidance_grid.png", shows, train)
        shows = "More guidance: more samples show their class (left), but they differ less (recall, middle)."
        part.add_picture(run.folder / "guidance_curve.png", shows, test_command(run))
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


def guidance_sentences(rows: list[dict]) -> list[str]:
    """What figures at several guidance scales say."""
    if len(rows) < 2:
        return []
    said = []
    for name, what, best in (
        ("class_accuracy", "The share of samples that show their class", max),
        ("recall", "Recall, the share of training images that samples come near to,", max),
        ("frechet_distance", "The Fréchet distance to the training images", min),
    ):
        known = [row for row in rows if row.get(name) is not None]
        if known:
            values = ", ".join(f"{row[name]:.3g} at w = {row['guidance_scale']:g}" for row in known)
            winner = best(known, key=lambda row: row[name])["guidance_scale"]
            said.append(f"{what} is {values}: {'highest' if best is max else 'smallest'} at w = {winner:g}.")
    return said


def butterflies_part(run: Run) -> Part:
    """2.5: what the butterflies look like."""
    part, conditional = Part(run.name), run.config["class_free_guidance"]
    part.sentences.append(f"At {run.config['image_size']} pixels; the sections above have its figures.")
    name = "class_grid.png" if conditional else "samples.png"
    shows = f"Samples{' of every species, a row for each' if conditional else ''}."
    part.add_picture(run.folder / name, shows, train_command(run))
    return part


def butterflies_answer(run: Run) -> str:
    """2.5 in a sentence."""
    images = int(run.log[-1]["step"]) * run.config["batch_size"]
    given = "conditional on the species" if run.config["class_free_guidance"] else "unconditional"
    size = run.config["image_size"]
    loss = np.mean(run.report["losses"]["test"]["l2"])
    return (
        f"A model {given} at {size}x{size} pixels has a mean l2 loss of {loss:.3g} on test images after a training on "
        f"{images:,} images; its samples are below."
    )


# ---------------------------------------------------------------------------- 2.2 to 2.4: studies


def study_part(study: Study) -> Part:
    """2.2 training, 2.3, 2.4: which of the compared settings won, by how much and where."""
    part = Part(f"{study.folder.name}: {', '.join(study.varied)} compared")
    for row in over_seeds(study.rows, study.varied):  # table.md has the other columns
        part.table.append({name: cell for name, cell in row.items() if "loss" not in name and name != "seconds"})
    part.sentences += [study_answer(study), *loss_sentences(study)]
    if {"schedule", "timesteps"} & set(study.varied):
        part.sentences.append(NOT_COMPARABLE)
    command = compare_command(study)
    shows = "Samples of every setting, a row for each; a column starts from the same noise."
    part.add_picture(study.folder / "samples.png", shows, command)
    shows = "Losses over the steps, and over the noise level, where settings are comparable; a line per run."
    part.add_picture(study.folder / "curves.png", shows, command)
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
    """Which setting has the smallest mean, and which differences to it are more than chance.

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
