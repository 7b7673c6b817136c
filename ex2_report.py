"""Everything under `results/` as one page, in the order of the exercise sheet: `index.html` and `report.md`.

Sentences are computed from the figures, and parts that are missing are named with the command that makes them.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ex2_compare import NOT_COMPARABLE, as_markdown
from ex2_config import Config
from ex2_data import InputError

TEMPLATES = Path(__file__).parent
STUDY = "python ex2_main.py compare --preset quick --vary schedule=linear,cosine,sigmoid"


# ---------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Run:
    """A tested run: its folder, settings and figures."""

    folder: Path
    config: dict
    report: dict

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Study:
    """A comparison: its folder, its table (column -> cell, as text) and the figures of its runs."""

    folder: Path
    rows: list[dict[str, str]]
    runs: list[Run]

    @property
    def varied(self) -> list[str]:
        """The settings that its runs differ in."""
        return [setting.partition("=")[0] for setting in self.runs[0].name.split(",")]


def find_runs(folder: Path) -> list[Run]:
    """The tested runs in `folder`, by name; dry runs are none."""
    runs = []
    for path in sorted(folder.glob("*/test_metrics.json")):
        settings = path.with_name("config.json")
        config = json.loads(settings.read_text()) if settings.is_file() else {"dry_run": True}
        if not config["dry_run"]:
            runs.append(Run(path.parent, config, json.loads(path.read_text())))
    return runs


def find_studies(folder: Path) -> list[Study]:
    """The comparisons in `folder`, by name."""
    studies = []
    for path in sorted(folder.glob("*/table.csv")):
        runs = find_runs(path.parent)
        if runs:
            with open(path, newline="", encoding="utf-8") as file:
                studies.append(Study(path.parent, list(csv.DictReader(file)), runs))
    return studies


# ---------------------------------------------------------------------------- what is said


@dataclass
class Part:
    """What one run or study has to say to one sub-task."""

    title: str
    sentences: list[str] = field(default_factory=list)
    table: list[dict] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)  # (file, what it shows)
    animations: list[tuple[Path, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)  # (what, command that makes it)

    def add_picture(self, path: Path, shows: str, command: str) -> None:
        """Puts the picture in, or says what makes it."""
        kind = self.animations if path.suffix == ".gif" else self.pictures
        if path.is_file():
            kind.append((path, shows))
        else:
            self.missing.append((f"{path.name}: {shows}", command))


@dataclass(frozen=True)
class Section:
    """One sub-task of the sheet."""

    anchor: str
    title: str
    parts: list[Part]


def test_command(run: Run) -> str:
    """The command that tests a run."""
    return f"python ex2_main.py test --checkpoint {run.folder.as_posix()}"


def train_command(run: Run) -> str:
    """The command that trains and draws a run: its settings where they are not the default."""
    flags = []
    for f in dataclasses.fields(Config):
        value = run.config.get(f.name, f.default)
        value = tuple(value) if isinstance(value, list) else value
        if value == f.default or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{f.name}" if value else f"--no_{f.name}")
        else:
            flags.append(f"--{f.name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return f"python ex2_main.py {' '.join(flags)}"


def network_part(run: Run) -> Part:
    """2.1: what was trained, on what, for how long."""
    config, part = run.config, Part(run.name)
    size = config["image_size"]
    kind = "class-conditional" if config["class_free_guidance"] else "unconditional"
    part.sentences.append(
        f"A {kind} attention U-Net with {run.report['parameters']:,} parameters (dim {config['dim']}, multipliers "
        f"{', '.join(map(str, config['dim_mults']))}) on {config['dataset']} at {size}x{size}; {config['timesteps']} "
        f"timesteps of the {config['schedule']} schedule, {config['epochs']} epochs of batches of "
        f"{config['batch_size']} with AdamW at a peak learning rate of {config['lr']:g}."
    )
    log = run.folder / "log.csv"
    if log.is_file():
        with open(log, newline="") as file:
            last = list(csv.DictReader(file))[-1]
        part.sentences.append(
            f"Training took {int(last['step']):,} steps in {float(last['seconds']) / 60:.1f} minutes."
        )
    train = train_command(run)
    part.add_picture(run.folder / "time_embedding.png", "the sinusoidal embedding of every time", train)
    part.add_picture(run.folder / "training.png", "loss, learning rate and gradient norm over the steps", train)
    return part


def process_part(run: Run) -> Part:
    """2.2 a-d, f: forward and reverse process as pictures."""
    part, train = Part(run.name), train_command(run)
    part.add_picture(run.folder / "forward.gif", "forward process: test images on their way to noise", train)
    part.add_picture(run.folder / "reverse.gif", "reverse process: noise on its way to images", train)
    part.add_picture(run.folder / "forward_strip.png", "forward process, x_t over t", train)
    part.add_picture(run.folder / "reverse_strip.png", "reverse process, x_t over t", train)
    part.add_picture(run.folder / "x_zero_strip.png", "the model's estimate of x_0 at each t", train)
    if not run.config["class_free_guidance"]:
        part.add_picture(run.folder / "samples.png", "samples", train)
    return part


def quality_part(run: Run) -> Part:
    """2.2 e: losses, bits per dimension, figures of samples."""
    part, report = Part(run.name), run.report
    test, val = report["losses"]["test"], report["losses"]["val"]
    hard, easy = int(np.argmax(test["l2"])), int(np.argmin(test["l2"]))
    part.sentences.append(
        f"The noise is hardest to tell at t = {test['t'][hard] + 1} (l2 loss {test['l2'][hard]:.3g}) and easiest at "
        f"t = {test['t'][easy] + 1} ({test['l2'][easy]:.2g}): the more of x_t is noise, the easier."
    )
    gap = np.mean(val["l2"]) / np.mean(test["l2"]) - 1
    part.sentences.append(
        f"Validation and test loss differ by {abs(gap):.1%} on average, on {val['images']} and {test['images']} images."
    )
    bound = report["bits_per_dim"]
    name = min(("beta", "beta_tilde"), key=lambda name: bound[name]["total"])
    part.sentences.append(
        f"The variational bound is {bound[name]['total']:.2f} bits per dimension at best (sigma^2 = {name}, "
        f"{bound['images']} test images); {bound[name]['decoder'] / bound[name]['total']:.0%} of it is the last step."
    )
    if "samples" in report:
        part.sentences += samples_sentences(run)
        part.table = samples_table(report["samples"])
    else:
        part.missing.append(("figures of samples (Fréchet distance, precision and recall)", test_command(run)))
    part.add_picture(run.folder / "loss_over_t.png", "loss over the time", test_command(run))
    part.add_picture(run.folder / "bits_per_dim.png", "terms of the variational bound", test_command(run))
    part.add_picture(run.folder / "nearest.png", "samples and their nearest training images", test_command(run))
    return part


def own_row(run: Run) -> dict:
    """Figures of samples at the run's own guidance scale."""
    rows = run.report["samples"]["by_scale"]
    wanted = run.config["guidance_scale"]
    wanted = float(run.config["class_free_guidance"] and run.config["p_uncond"] > 0) if wanted is None else wanted
    return next((row for row in rows if row["guidance_scale"] == wanted), rows[0])


def samples_sentences(run: Run) -> list[str]:
    """What the figures of samples say."""
    samples, row = run.report["samples"], own_row(run)
    near, far = samples["test_images"]["frechet_distance"], samples["noise"]["frechet_distance"]
    floor = "" if near is None else f"{near:.3g} for as many test images and "
    sentences = [
        f"The Fréchet distance of {samples['count']} samples at w = {row['guidance_scale']:g} to the training images "
        f"is {row['frechet_distance']:.3g} ({floor}{far:.3g} for noise; features: {samples['features']})."
    ]
    pixels = samples["memorisation"]["pixels"]
    verdict = "look for copies in the picture" if pixels["share_nearer"] > 0.2 else "they are no copies"
    sentences.append(
        f"The nearest training image is {pixels['median']['samples']:.1f} grey levels from a sample and "
        f"{pixels['median']['test_images']:.1f} from a test image (medians), and {pixels['share_nearer']:.0%} of the "
        f"samples are nearer than 95% of test images: {verdict}."
    )
    return sentences


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


def guidance_part(run: Run) -> Part:
    """2.4: samples by class and what the guidance scale does."""
    part, train = Part(run.name), train_command(run)
    rows = run.report.get("samples", {}).get("by_scale", [])
    if len(rows) > 1 and "class_accuracy" in rows[0]:
        plain = min(rows, key=lambda row: abs(row["guidance_scale"]))
        best = max(rows, key=lambda row: row["class_accuracy"])
        part.sentences.append(
            f"Of the samples at w = {plain['guidance_scale']:g}, {plain['class_accuracy']:.0%} show their class; at "
            f"w = {best['guidance_scale']:g} it is {best['class_accuracy']:.0%}, the most of all scales."
        )
        widest, last = max(rows, key=lambda row: row["recall"]), rows[-1]
        part.sentences.append(
            f"Recall, the share of training images that samples come near to, is highest at w = "
            f"{widest['guidance_scale']:g} ({widest['recall']:.2f}) and {last['recall']:.2f} at w = "
            f"{last['guidance_scale']:g}: guidance trades diversity for class."
            if widest is not last
            else f"Recall is highest at the largest scale, w = {last['guidance_scale']:g} ({last['recall']:.2f})."
        )
        nearest = min(rows, key=lambda row: row["frechet_distance"])
        part.sentences.append(f"The Fréchet distance is smallest at w = {nearest['guidance_scale']:g}.")
    part.add_picture(run.folder / "class_grid.png", "samples of every class", train)
    part.add_picture(run.folder / "guidance_grid.png", "the same noise at growing guidance scale", train)
    part.add_picture(
        run.folder / "guidance_curve.png", "class accuracy, precision, recall, distance over w", test_command(run)
    )
    return part


def study_part(study: Study) -> Part:
    """2.2 training, 2.3, 2.4: which of the compared settings won, by how much and where."""
    part = Part(f"{study.folder.name}: {', '.join(study.varied)} compared", table=[dict(row) for row in study.rows])
    criterion = "Fréchet distance" if study.rows[0].get("Fréchet distance") else "bits/dim"
    ranked = sorted(study.rows, key=lambda row: float(row[criterion]))
    label = {id(row): ", ".join(row[name] for name in study.varied) for row in ranked}
    rest = [
        f"{label[id(row)]} {float(row[criterion]) / max(float(ranked[0][criterion]), 1e-9):.2g} times that"
        for row in ranked[1:]
    ]
    best = float(ranked[0][criterion])
    part.sentences.append(f"{label[id(ranked[0])]} wins with the smallest {criterion}, {best:.3g}; {', '.join(rest)}.")
    part.sentences += loss_sentences(study)
    if {"schedule", "timesteps"} & set(study.varied):
        part.sentences.append(NOT_COMPARABLE)
    command = "the comparison's command, given again"
    part.add_picture(study.folder / "samples.png", "samples of every run, the same noise in every column", command)
    part.add_picture(study.folder / "curves.png", "losses over the steps, and over log-SNR", command)
    return part


def loss_sentences(study: Study) -> list[str]:
    """Which run has the smallest test loss at noise levels that all of them know."""
    curves = {run.name: run.report["losses"]["test"] for run in study.runs}
    low = max(min(curve["log_snr"]) for curve in curves.values())
    high = min(max(curve["log_snr"]) for curve in curves.values())
    said = []
    for log_snr in (-2, 2):
        if low <= log_snr <= high:
            losses = {name: loss_at(curve, log_snr) for name, curve in curves.items()}
            best = min(losses, key=losses.get)
            worst = max(losses, key=losses.get)
            times = {run.name: time_at(curves[run.name], log_snr) for run in study.runs}
            said.append(
                f"At log-SNR {log_snr} (t = {times[best]} of {best}) {best} has the smallest test loss, "
                f"{losses[best]:.3g}; the largest is {losses[worst]:.3g} ({worst})."
            )
    return said


def loss_at(curve: dict, log_snr: float) -> float:
    """l2 loss at a log-SNR, linear between the times that were tested."""
    return float(np.interp(log_snr, curve["log_snr"][::-1], curve["l2"][::-1]))


def time_at(curve: dict, log_snr: float) -> int:
    """The time, counted as in the paper, at a log-SNR."""
    return round(float(np.interp(log_snr, curve["log_snr"][::-1], curve["t"][::-1]))) + 1


def sections(runs: list[Run], studies: list[Study]) -> list[Section]:
    """The page, sub-task by sub-task."""
    schedules = Part("The schedules")
    drawn = [run for run in runs if (run.folder / "schedules.png").is_file()]
    for run in drawn[:1]:
        schedules.add_picture(run.folder / "schedules.png", "beta, alpha-bar and log-SNR of each schedule", "")
    by_kind = {True: [], False: []}
    for study in studies:
        by_kind["schedule" in study.varied].append(study)
    guided = [run for run in runs if run.config["class_free_guidance"]]
    null = [study for study in by_kind[False] if {"null_token", "p_uncond"} & set(study.varied)]
    training = [study for study in by_kind[False] if study not in null]
    butterflies = [run for run in runs if run.config["dataset"] == "butterflies"]
    return [
        Section("network", "2.1 The network and its training", [network_part(run) for run in runs]),
        Section("process", "2.2 a-d, f: Noising and denoising", [process_part(run) for run in runs]),
        Section("quality", "2.2 e: How good is it?", [quality_part(run) for run in runs]),
        Section(
            "training",
            "2.2 Training with other settings",
            or_missing(training, "a study of the learning rate", "compare --preset quick --vary lr=3e-4,1e-3,3e-3"),
        ),
        Section(
            "schedules",
            "2.3 Beta schedules",
            [schedules, *or_missing(by_kind[True], "a comparison of the schedules", STUDY.split("ex2_main.py ")[1])],
        ),
        Section(
            "guidance",
            "2.4 Classifier-free guidance",
            [
                *(guidance_part(run) for run in guided),
                *or_missing(
                    null, "a comparison of null tokens", "compare --preset quick --vary null_token=learned,zero"
                ),
            ],
        ),
        Section(
            "butterflies",
            "2.5 Butterflies",
            [Part(run.name, [f"See {run.name} in the sections above."]) for run in butterflies]
            or [Part("", missing=[("a run on butterflies", "python ex2_main.py --preset butterflies")])],
        ),
    ]


def or_missing(studies: list[Study], what: str, command: str) -> list[Part]:
    """The parts of the studies, or one that says how to make one."""
    return [study_part(study) for study in studies] or [Part("", missing=[(what, f"python ex2_main.py {command}")])]


# ---------------------------------------------------------------------------- pages


def write_page(results_dir: Path) -> None:
    """index.html, which needs no other file and no network, and report.md, which shows the files where they are.

    Raises:
        InputError: nothing was tested yet.
    """
    runs, studies = find_runs(results_dir), find_studies(results_dir)
    if not runs and not studies:
        raise InputError(
            f"no tested run in {results_dir}: train one first, for example python ex2_main.py --preset quick"
        )
    content = sections(runs, studies)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(data_uri=data_uri, frames=lambda path: list(frames(path)), figure=figure)
    page = environment.get_template("ex2_report.html").render(sections=content)
    (results_dir / "index.html").write_text(page, encoding="utf-8")
    (results_dir / "report.md").write_text("\n".join(as_text(content, results_dir)), encoding="utf-8")


def figure(value) -> str:
    """A cell of a table: figures to four digits, a dash where there is none."""
    if value is None or value == "":
        return "-"
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return str(value)


def data_uri(path: Path) -> str:
    """A PNG file as the text that puts it into a page."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def frames(path: Path) -> Iterator[str]:
    """The frames of a GIF, each as `data_uri` of a PNG: a page can't stop a GIF, but it can leaf through pictures."""
    for frame in imageio.imread(path, index=None):
        buffer = io.BytesIO()
        Image.fromarray(frame).quantize(64).save(buffer, "png", optimize=True)
        yield "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_text(content: Iterable[Section], results_dir: Path) -> Iterator[str]:
    """The lines of report.md."""
    yield "# Denoising diffusion: results\n"
    for section in content:
        yield f"## {section.title}\n"
        for part in section.parts:
            if part.title:
                yield f"### {part.title}\n"
            if part.sentences:
                yield " ".join(part.sentences) + "\n"
            if part.table:
                yield as_markdown([{name: figure(cell) for name, cell in row.items()} for row in part.table])
            for path, shows in (*part.animations, *part.pictures):
                yield f"![{shows}]({path.relative_to(results_dir).as_posix().replace(' ', '%20')})\n"
            for what, command in part.missing:
                yield f"Missing: {what}. Made by `{command}`.\n"
