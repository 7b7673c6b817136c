"""What runs and studies say to each sub-task of the sheet (2.1 to 2.5): a sentence, tables, pictures, what is missing.

Every number is computed from the entry it speaks of. A number that isn't there takes its half-sentence with it.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageSequence

from ex2.data.sets import DATASETS
from ex2.evaluation import tables
from ex2.evaluation.sanity import images_seen, loss_at, verdict
from ex2.machine.files import read_commands
from ex2.settings.config import Config

CLEAR = 1.05  # ratio of two metrics of single runs from which on one is called smaller: less is chance
QUICK, COMPARE = "python ex2_main.py --preset quick", "python ex2_main.py compare --preset quick --seeds 3 --vary"
OF_TEST = ("loss_over_t.png", "bits_per_dim.png", "nearest.png", "guidance_curve.png")  # pictures that `test` makes
CAPTIONS = {
    "class_grid.png": "Samples of every class, a row for each.",
    "samples.png": "Samples.",
    "forward.gif": "Forward process, from images of the test set (left end of the slider) to noise.",
    "reverse.gif": "The reverse process, from noise (left end of the slider) to images.",
    "time_embedding.png": "Each row is a sine or cosine of t, from fast (top) to slow: no two timesteps look alike.",
    "training.png": "Left: the loss falls steeply at first, then slowly. Middle: the learning rate. Right: the norm of "
    "the gradient.",
    "forward_strip.png": "Forward process: noise is added from left to right, until nothing of the image is left.",
    "reverse_strip.png": "Reverse process: the model removes a little noise at a time; large forms come first.",
    "x_zero_strip.png": "The estimate of x_0 at each t: clamped noise at T, then a blurry mean, finally one image.",
    "nearest.png": "Top: samples. Below each: the training image that is nearest to it, by pixels and by features.",
    "loss_over_t.png": "Loss over t. Dotted: a run of ours, to compare with. Dashed: the optimal loss, that of "
    "the ideal denoiser of the training set: a model that comes near it there, but not on test images, has "
    "memorised the training images.",
    "bits_per_dim.png": "Bits per dimension: most of the VLB comes from the last details, at small t.",
    "schedules.png": "Left: the noise a step adds. Middle: what is left of the image. Right: its log-SNR.",
    "guidance.gif": "A sample per class, from the same noise at every w, from -1 to 5.",
    "guidance_grid.png": "The same noise at growing w: at w = -1 the class has no say.",
    "guidance_curve.png": "Over the guidance scale: samples that show their class, precision and recall, distance.",
    "guidance_exact.png": "What does guidance sample? One pixel of two classes, N(+1, 0.5^2) and N(-1, 0.5^2), and "
    "exact predictions: not p(x | c)^(1+w) / p(x)^w, as is often said. Samples lie further out and vary less: at w = 1 "
    "the mean is 1.32, or 1.17 with fresh noise, where that distribution has 1.04.",
    "study/samples.png": "Samples of every setting, a row for each; a column starts from the same noise.",
    "study/curves.png": "Losses over the steps and, right, over the noise level: there schedules can be compared.",
}
TRY_IT = "Turn the knobs yourself, in your browser, from one file:"
WHY_IT_STOPS = (
    "Why does the loss stop falling so early? The noise of large t is soon learnt; that of small t can't be told from "
    "the image's own detail, however long one trains. Samples get better while the mean hardly moves. Is a validation "
    "loss above the training loss overfitting? Not by itself: it is a mean over a few fixed timesteps, of which t = 1 "
    "alone can be most, and the training loss one over random timesteps. 2.2 e compares like with like."
)
METRICS_EXPLAINED = (
    "Mean l2 losses of training and test images at the same timesteps (a guess of zero has 1); bits per dimension of "
    "test images; the fraction of samples that are nearer to a training image than 95% of test images (0.05 where "
    "nothing is copied, from 0.2 on look for copies below); medians of the distance to it, in grey levels."
)


@dataclass(frozen=True)
class Run:
    """A trained run.

    metrics: the valid entries of test_metrics.json, in the shape of `METRICS` in page.py; empty if it was not tested.
    log: the rows of log.csv.
    """

    folder: Path
    config: Config
    metrics: dict = field(default_factory=dict)
    log: list = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def test_command(self) -> str:
        """The command that makes missing metrics."""
        return f"python ex2_main.py test --checkpoint {shlex.quote(self.folder.as_posix())}"

    @property
    def test_curve(self) -> dict | None:
        return self.metrics.get("losses", {}).get("test")

    @property
    def by_scale(self) -> dict[float, dict]:
        """Guidance scale -> metrics of samples."""
        return {row["guidance_scale"]: row for row in self.metrics.get("samples", {}).get("by_scale", ())}

    @property
    def own_row(self) -> dict:
        """The metrics of samples at the run's own guidance scale."""
        return self.by_scale.get(self.metrics.get("samples", {}).get("own_scale"), {})

    @property
    def bits_per_dim(self) -> float | None:
        return min((bound["total"] for bound in self.metrics.get("bits_per_dim", {}).values()), default=None)

    def mean_loss(self, name: str) -> float | None:
        """Mean l2 loss of "test", "train" or "optimal"; None unless it has the timesteps of "test"."""
        curve, test = self.metrics.get("losses", {}).get(name), self.test_curve
        return statistics.mean(curve["l2"]) if curve and test and curve["t"] == test["t"] else None


@dataclass(frozen=True)
class Study:
    """A comparison: its folder, the settings it varied, and its runs by name; None for those that failed."""

    folder: Path
    varied: Sequence[str]
    runs: dict[str, Run | None]


@dataclass
class Part:
    """A piece of a section: text, and a table, pictures that it is the caption of, commands, or links."""

    text: str = ""
    table: list[dict] = field(default_factory=list)
    pictures: list[tuple[str, Path]] = field(default_factory=list)  # (whose, file)
    commands: list[str] = field(default_factory=list)
    links: list[tuple[str, Path]] = field(default_factory=list)  # (text, file)


@dataclass
class Section:
    """One sub-task of the sheet: its answer, what shows it, and what is missing (command -> what it would make)."""

    anchor: str
    title: str
    answer: str = ""
    parts: list[Part] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def miss(self, what: str, command: str, when: bool) -> None:
        if when:
            self.missing.setdefault(command, []).append(what)

    def show(self, name: str, subjects: Sequence[Run | Study], caption: str = "") -> None:
        """Adds the pictures of one kind under one caption, and names those that are not there."""
        pictures = []
        for subject in subjects:
            folder, is_there = subject.folder, bool(read_frames(subject.folder / name))
            pictures += [(folder.name, folder / name)] if is_there else []
            command = subject.test_command if name in OF_TEST else latest_command(folder)
            self.miss(f"{name} of {folder.name}", command or "the command that made the rest of it", not is_there)
        self.parts += [Part(caption or CAPTIONS[name], pictures=pictures)] if pictures else []


def latest_command(folder: Path, test: bool = False) -> str:
    """The latest command that trained or compared, or that evaluated samples (`test`); "" where none is known."""
    for line in reversed(read_commands(folder)):
        command = re.match(r"python ex2_main\.py(?: (test|sample)\b)?(?!.*--eval_samples[ =]0\b)", line)
        if command and command[1] == ("test" if test else None):
            return line
    return ""


def read_frames(path: Path) -> list[Image.Image]:
    """All frames of a picture; none if it is missing or damaged anywhere."""
    try:
        with Image.open(path) as image:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except Exception:  # Pillow's decoders raise many kinds for damaged files
        return []


def sections(runs: Sequence[Run], studies: Sequence[Study], live: Sequence[tuple[str, Path]] = ()) -> list[Section]:
    """The page: its opening, the sub-tasks in the order of the sheet, and the commands.

    live: pages of `export` in which models sample, (name, file) each.
    """
    null = [study for study in studies if {"null_token", "p_uncond"} & set(study.varied)]
    training = [study for study in studies if set(study.varied) - {"schedule", "null_token", "p_uncond"}]
    schedule = [study for study in studies if "schedule" in study.varied]
    opening = Section("samples", "Denoising diffusion: results")
    opening.parts += [Part(TRY_IT, links=list(live))] if live else []
    for run in runs[:1]:
        command = f"python ex2_main.py export --checkpoint {shlex.quote(run.folder.as_posix())}"
        opening.miss("a page in which a model samples", command, not live)
    opening.show("class_grid.png", [run for run in runs if run.config.class_free_guidance])
    opening.show("samples.png", [run for run in runs if not run.config.class_free_guidance])
    opening.show("reverse.gif", runs)
    schedules = Section("schedules", "2.3 Beta schedules")
    schedules.show("schedules.png", runs[:1])
    schedules.parts.append(Part(tables.NOT_COMPARABLE))
    others = [run for run in runs if DATASETS[run.config.dataset].sub_task == "2.5"]
    main = [run for run in runs if run not in others] or runs
    content = [opening, network(runs), process(main), quality(runs)]
    for section in content[1:]:
        section.miss("a trained run", QUICK, not runs)
    settings = Section("training", "2.2 Training with other settings")
    content.append(add_studies(settings, training, "a study of the learning rate", "lr=3e-4,1e-3,3e-3"))
    content.append(add_studies(schedules, schedule, "a comparison of them", "schedule=linear,cosine,sigmoid"))
    content.append(add_studies(guidance(runs), null, "a comparison of null tokens", "null_token=learned,zero"))
    commands = Section("commands", "How this was made")
    for subject in (*runs, *studies):
        known = filter(None, (latest_command(subject.folder), latest_command(subject.folder, test=True)))
        commands.parts.append(Part(subject.folder.name, commands=list(known)))
    return [*content, other_pictures(others, main), commands]


def of_data(name: str, runs: Sequence[Run]) -> list[Run]:
    """The runs whose picture with images of the data set is there, or may be asked for."""
    return [run for run in runs if DATASETS[run.config.dataset].may_be_shown or read_frames(run.folder / name)]


def network(runs: Sequence[Run]) -> Section:
    """2.1: the network, what was trained, on what, for how long."""
    section = Section("network", "2.1 The network and its training")
    for run in runs[:1]:
        size = f" of {run.metrics['parameters']:,} parameters" if "parameters" in run.metrics else ""
        section.answer = (
            f"A U-Net{size} predicts the noise in x_t. It is told the time t as sines and cosines of "
            f"{run.config.dim // 2} frequencies, which an MLP turns into a scale and a shift for every residual block."
        )
    section.parts.append(Part(table=[describe_run(run) for run in runs]))
    notes = [(run.name, run.folder / "note.txt") for run in runs]  # the user's own words on a run
    notes = [(name, path.read_text("utf-8", "replace").split()) for name, path in notes if path.is_file()]
    section.parts += [Part(f"{name}: {' '.join(words)}") for name, words in notes]
    section.show("time_embedding.png", runs[:1])
    section.show("training.png", runs)
    section.parts.append(Part(WHY_IT_STOPS))
    return section


def describe_run(run: Run) -> dict:
    """The settings of a run, as a row."""
    names = ("dataset", "image_size", "dim", "dim_mults", "timesteps", "schedule", "loss_type", "lr", "batch_size")
    row = {"run": run.name, **{name.replace("_", " "): getattr(run.config, name) for name in names}}
    row.update({"parameters": run.metrics.get("parameters"), "images seen": images_seen(vars(run.config), run.log)})
    return {**row, "minutes": round(float(run.log[-1]["seconds"] or 0) / 60, 1) if run.log else None}


def process(runs: Sequence[Run]) -> Section:
    """2.2 a-d, f: forward and reverse process as pictures."""
    section = Section("process", "2.2 a-d, f: Noising and denoising")
    for run in runs[:1]:
        curve, T = run.test_curve, run.config.timesteps
        if curve and curve["t"][-1] == T - 1:  # else t = T was not evaluated
            left = 1 / (1 + math.exp(min(-curve["log_snr"][-1], 700)))
            section.answer = f"After {T} steps of Eq. 2 a fraction of {left:.1g} of the image's variance is left. "
        steps = run.config.sample_steps or T
        section.answer += f"The reverse process goes back from noise to an image, here in {steps} steps."
    section.show("forward.gif", [run for run in runs if DATASETS[run.config.dataset].may_be_shown][:1])
    return show_strips(section, runs)


def show_strips(section: Section, runs: Sequence[Run]) -> Section:
    section.show("forward_strip.png", of_data("forward_strip.png", runs))
    section.show("reverse_strip.png", runs)
    section.show("x_zero_strip.png", runs)
    return section


def quality(runs: Sequence[Run]) -> Section:
    """2.2 e: losses, bits per dimension, metrics of samples."""
    section, tested = Section("quality", "2.2 e: How good is it?"), [run for run in runs if run.metrics]
    section.answer = next(filter(None, map(quality_answer, runs)), "")
    section.parts.append(Part(METRICS_EXPLAINED, [describe_metrics(run) for run in tested]))
    for run in tested:
        if run.test_curve:
            said = " ".join(verdict(vars(run.config), run.metrics, run.log))
            section.parts.append(Part(f"Is {run.name} normal? {said}"))
    for run in runs:
        what = "metrics of samples" if run.metrics else "metrics"
        section.miss(f"{what} of {run.name}", run.test_command, not run.own_row)
    sampled = [run for run in tested if run.by_scale]
    for run in sampled:
        samples = run.metrics["samples"]
        text = f"{run.name}: {samples['count']} samples at each scale, by features of: {samples['features']}"
        section.parts.append(Part(text, tables.samples_table(samples)))
    section.show("loss_over_t.png", tested)
    section.show("bits_per_dim.png", tested)
    section.show("nearest.png", of_data("nearest.png", sampled))
    return section


def describe_metrics(run: Run) -> dict:
    """Losses, bits per dimension and nearness to training images of a run, as a row."""
    pixels = run.metrics.get("samples", {}).get("memorisation", {}).get("pixels", {})
    row = {"run": run.name, **{f"{name} loss": run.mean_loss(name) for name in ("test", "train", "optimal")}}
    row.update({"bits/dim": run.bits_per_dim, "nearer": pixels.get("fraction_nearer")})
    median = pixels.get("median", {})
    return {**row, "samples to nearest": median.get("samples"), "test images to nearest": median.get("test_images")}


def quality_answer(run: Run) -> str:
    """2.2 e, 2.5 in a sentence."""
    said, row, real = [], run.own_row, run.metrics.get("samples", {}).get("test_images", {})
    test, train = run.mean_loss("test"), run.mean_loss("train")
    if test is not None:
        beside = "" if train is None else f", that of training images at the same timesteps {train:.3g}"
        said.append(f"the mean l2 loss of test images is {test:.3g}{beside}")
    distance = row.get("frechet_distance_at_test_count", row.get("frechet_distance"))
    if distance is not None:
        beside = f", as many test images {real['frechet_distance']:.3g}" if "frechet_distance" in real else ""
        said.append(f"its samples have a Fréchet distance of {distance:.3g} to the training images{beside}")
    if "class_accuracy" in row:
        said.append(f"{row['class_accuracy']:.0%} of the samples show their class")
    return f"{run.name} ({run.config.image_size} pixels): {'; '.join(said)}." if said else ""


def guidance(runs: Sequence[Run]) -> Section:
    """2.4: what the class and the guidance scale do."""
    section, guided = Section("guidance", "2.4 Classifier-free guidance"), [run for run in runs if run.config.can_guide]
    section.answer = next(filter(None, map(guidance_answer, guided)), "")
    section.miss("a run with classes", QUICK, not guided)
    for run in guided:
        lacks = bool(run.by_scale) and -1 not in run.by_scale
        command = f"{run.test_command} --eval_scales -1 0 1 3"
        section.miss(f"samples of {run.name} without the class (w = -1)", command, lacks)
    section.show("guidance.gif", guided[:1])
    section.show("guidance_grid.png", guided)
    section.show("guidance_curve.png", guided)
    section.show("guidance_exact.png", guided[:1])
    return section


def guidance_answer(run: Run) -> str:
    """2.4 in a sentence."""
    said, names = [], ("class_accuracy", "recall")
    accuracy, recall = ({w: row[name] for w, row in run.by_scale.items() if name in row} for name in names)
    if accuracy:
        best = max(accuracy, key=accuracy.get)
        beside = f", {accuracy[-1]:.0%} at w = -1, where the class has no say" if -1 in accuracy else ""
        said.append(f"{accuracy[best]:.0%} of the samples show their class at w = {best:g}{beside}")
    if len(recall) > 1:
        each = ", ".join(f"{recall[w]:.2f} at w = {w:g}" for w in sorted(recall))
        said.append(f"recall, which measures variety, is {each}")
    return f"{run.name}: {'; '.join(said)}." if said else ""


def other_pictures(others: Sequence[Run], shown: Sequence[Run]) -> Section:
    """2.5: butterflies and any folder of images; their samples open the page. shown: runs whose process 2.2 shows."""
    section = Section("pictures", "2.5 Butterflies and other pictures")
    section.answer = " ".join(filter(None, map(quality_answer, others)))
    section.miss("a run on other pictures", "python ex2_main.py --preset butterflies", not others)
    return show_strips(section, [run for run in others if run not in shown])


def add_studies(section: Section, studies: Sequence[Study], missing: str, vary: str) -> Section:
    """Adds to a section what studies say to it."""
    section.miss(missing, f"{COMPARE} {vary}", not studies)
    section.answer = " ".join(filter(None, (section.answer, *map(study_answer, studies))))
    for study in studies:
        rows = [describe_setting(study, run) for run in study.runs.values() if run]
        text = f"{study.folder.name}: means over the seeds, each run at its own w"
        section.parts.append(Part(text, tables.summarise_seeds(rows, study.varied)))
    for name in ("samples.png", "curves.png"):
        section.show(name, studies, CAPTIONS[f"study/{name}"])
    return section


def describe_setting(study: Study, run: Run) -> dict:
    """The metrics of a run of a study, at its own guidance scale and at equal noise levels, as a row."""
    row, curve = {name: getattr(run.config, name) for name in (*study.varied, "seed")}, run.test_curve
    row.update({"w": None, "bits/dim": run.bits_per_dim, **tables.sample_cells(run.own_row)})
    for log_snr in (-2, 2):
        known = curve and curve["log_snr"][-1] <= log_snr <= curve["log_snr"][0]
        row[f"l2 at log-SNR {log_snr}"] = loss_at(curve, log_snr) if known else None
    return row


def study_answer(study: Study) -> str:
    """Which setting has the smallest Fréchet distance; bits per dimension where no samples were evaluated."""
    rows = {name: describe_setting(study, run) if run else {} for name, run in study.runs.items()}
    has_samples = any(row.get("Fréchet distance") is not None for row in rows.values())
    criterion = "Fréchet distance" if has_samples else "bits/dim"
    values: dict[str, dict] = {}
    for row in [row for row in rows.values() if row.get(criterion) is not None]:
        setting = ", ".join(f"{name} {row[name]}" for name in study.varied)
        values.setdefault(setting, {})[row["seed"]] = row[criterion]
    left_out = [name for name, row in rows.items() if row.get(criterion) is None]
    without = f" Left out, as it failed or was not evaluated: {'; '.join(left_out)}." if left_out else ""
    return compare_settings(values, criterion) + without


def compare_settings(values: dict[str, dict], what: str) -> str:
    """Which setting has the smallest mean of a metric, and how much more the others have: chance, or clearly.

    Args:
        values: setting -> {seed: metric}. Differences are taken seed by seed, as runs of one seed start from the same
            weights and noise; seeds that not all settings have are left out.
        what: the metric.
    """
    seeds = sorted(set.intersection(*map(set, values.values()))) if len(values) > 1 else []
    if not seeds:
        return f"{what}: no two settings to compare with the same seed." if values else ""
    values = {name: [of_seed[seed] for seed in seeds] for name, of_seed in values.items()}
    best, *rest = sorted(values, key=lambda name: statistics.mean(values[name]))
    said = []
    for name in rest:
        gaps = [value - least for value, least in zip(values[name], values[best])]
        margin = tables.half_width(gaps) if len(seeds) > 1 else (CLEAR - 1) * values[best][0]
        chance = "" if statistics.mean(gaps) > margin else ", which may be chance"
        said.append(f"{tables.format_cell(tables.mean_and_interval(gaps))} more for {name}{chance}")
    over = f"mean of {len(seeds)} seeds, 95% interval" if len(seeds) > 1 else "a single run"
    smallest = tables.format_cell(tables.mean_and_interval(values[best]))
    return f"{what}: smallest for {best} ({smallest}, {over}); {'; '.join(said)}."
