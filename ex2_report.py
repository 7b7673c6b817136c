"""Everything under `results/` as one page, in the order of the exercise sheet: `index.html` and `report.md`.

Sentences are computed from the figures, and parts that are missing are named with the command that makes them.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable
from urllib.parse import quote

import imageio.v3 as imageio
import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ex2_checkpoint import RunLog, read_json, write_atomically
from ex2_compare import NOT_COMPARABLE, as_markdown
from ex2_config import Config, config_of
from ex2_data import InputError
from ex2_diffusion import evenly_spaced

TEMPLATES = Path(__file__).parent
FRAMES = 17  # of an animation, at most: the page is one file
CLEAR = 1.05  # ratio of two figures from which on one is called smaller: less is chance
NEEDED = ("parameters", "losses", "bits_per_dim")  # of test_metrics.json
NOT_IN_COMMANDS = ("cuda", "resume", "allow_changes", "num_threads", "dry_run", "log_interval")


# ---------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Run:
    """A trained run: its folder, its settings, and its figures, which are empty where it was not tested."""

    folder: Path
    config: dict
    report: dict

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


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None, with a line where it should be one, for a dry run or settings of another version."""
    content = read_json(folder / "config.json")
    try:
        config = dataclasses.asdict(config_of({"config": content}, {}))
    except InputError as error:
        print(f"{folder} is left out: {error}")
        return None
    if not content or config["dry_run"]:
        return None
    report = read_json(folder / "test_metrics.json")
    return Run(folder, config, report if all(name in report for name in NEEDED) else {})


def find_runs(folder: Path) -> list[Run]:
    """The runs in `folder`, by name."""
    runs = (read_run(path.parent) for path in sorted(folder.glob("*/config.json")))
    return [run for run in runs if run is not None]


def find_studies(folder: Path) -> list[Study]:
    """The finished comparisons in `folder`, by name."""
    studies = []
    for path in sorted(folder.glob("*/study.json")):
        plan, table = read_json(path), path.with_name("table.csv")
        plan = {name: value if isinstance(value, (list, dict)) else [] for name, value in plan.items()}
        names = [name for name in plan.get("runs", ()) if (path.parent / str(name)).is_dir()]
        runs = [run for run in (read_run(path.parent / name) for name in names) if run is not None and run.report]
        if runs and table.is_file():
            text = table.read_bytes().decode("utf-8", "replace").replace("\0", "?")
            rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if None not in (*row, *row.values())]
            studies.append(Study(path.parent, list(map(str, plan.get("varied", ()))), rows, runs))
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

    def add_picture(self, path: Path, shows: str, command: str, needed: bool = True) -> None:
        """Puts the picture in or, where it is needed, says what makes it."""
        kind = self.animations if path.suffix == ".gif" else self.pictures
        if is_picture(path):
            kind.append((path, shows))
        elif needed:
            self.missing.append((f"{path.name}: {shows}", command))


def is_picture(path: Path) -> bool:
    """Whether a file is there and whole, with all its frames."""
    try:
        imageio.imread(path, index=None)
    except Exception:  # many kinds for damaged files
        return False
    return True


def tried(make: Callable[[Run | Study], Part], subject: Run | Study) -> Part:
    """What `make` says of a run or a study; where its files are cut off or another program's, just that."""
    try:
        return make(subject)
    except Exception as error:  # whatever a foreign file leads to
        print(f"{subject.folder}: left out of '{make.__name__}' ({type(error).__name__}: {error})")
        what = "what its damaged files, or those of another version, should show"
        return Part(subject.folder.name, missing=[(what, "the command that made them, given again")])


@dataclass(frozen=True)
class Section:
    """One sub-task of the sheet."""

    anchor: str
    title: str
    parts: list[Part]


def test_command(run: Run) -> str:
    """The command that tests a run."""
    return f"python ex2_main.py test --checkpoint {shlex.quote(run.folder.as_posix())}"


def train_command(run: Run) -> str:
    """The command that trains and draws a run: its settings where they are not the default."""
    # Defaults can depend on the data set, which is itself named where it is not the default one.
    default, flags = {**vars(Config(dataset=run.config["dataset"])), "dataset": Config().dataset}, []
    for f in dataclasses.fields(Config):
        value = run.config[f.name]
        value = tuple(value) if isinstance(value, list) else value
        if f.name in NOT_IN_COMMANDS or value is None or value == default[f.name]:
            continue
        if isinstance(value, bool):
            flags.append(f"--{f.name}" if value else f"--no_{f.name}")
        else:
            texts = map(str, value) if isinstance(value, tuple) else [str(value)]
            flags.append(f"--{f.name} {' '.join(map(shlex.quote, texts))}")
    return f"python ex2_main.py {' '.join(flags)}"


def network_part(run: Run) -> Part:
    """2.1: what was trained, on what, for how long."""
    config, part, train = run.config, Part(run.name), train_command(run)
    size = config["image_size"]
    parameters = f" with {run.report['parameters']:,} parameters" if run.report else ""
    part.sentences.append(
        f"{'Class-conditional' if config['class_free_guidance'] else 'Unconditional'} attention U-Net{parameters} "
        f"(dim {config['dim']}, multipliers {', '.join(map(str, config['dim_mults']))}) on {config['dataset']} at "
        f"{size}x{size}; {config['timesteps']} timesteps of the {config['schedule']} schedule; epochs: "
        f"{config['epochs']}, images per step: {config['batch_size']}, AdamW at a peak learning rate of "
        f"{config['lr']:g}, {config['loss_type']} loss."
    )
    rows = RunLog.read(run.folder / "log.csv")
    if rows:
        last = rows[-1]
        part.sentences.append(f"Training: {int(last['step']):,} steps in {float(last['seconds']) / 60:.1f} minutes.")
    part.add_picture(run.folder / "time_embedding.png", "the sinusoidal embedding of every time", train)
    part.add_picture(run.folder / "training.png", "loss, learning rate and gradient norm over the steps", train)
    return part


def process_part(run: Run) -> Part:
    """2.2 a-d, f: forward and reverse process as pictures."""
    part, train, data = Part(run.name), train_command(run), run.may_show_data
    part.add_picture(run.folder / "forward.gif", "forward process: test images on their way to noise", train, data)
    part.add_picture(run.folder / "reverse.gif", "reverse process: noise on its way to images", train)
    part.add_picture(run.folder / "forward_strip.png", "forward process, x_t over t", train, data)
    part.add_picture(run.folder / "reverse_strip.png", "reverse process, x_t over t", train)
    part.add_picture(run.folder / "x_zero_strip.png", "the model's estimate of x_0 at each t", train)
    if not run.config["class_free_guidance"]:
        part.add_picture(run.folder / "samples.png", "samples", train)
    return part


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
        shows = "samples and their nearest training images"
        part.add_picture(run.folder / "nearest.png", shows, test_again, run.may_show_data)
    else:
        part.missing.append(("figures of samples (Fréchet distance, precision and recall)", test_again))
    part.add_picture(run.folder / "loss_over_t.png", "loss over the time", test_again)
    part.add_picture(run.folder / "bits_per_dim.png", "terms of the variational bound", test_again)
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


def samples_sentences(samples: dict) -> list[str]:
    """What the figures of samples say."""
    row = next(row for row in samples["by_scale"] if row["guidance_scale"] == samples["own_scale"])
    said = []
    if row["frechet_distance"] is not None:
        near, far = samples["test_images"]["frechet_distance"], samples["noise"]["frechet_distance"]
        floor = "" if near is None else f"{near:.3g} for {samples['test_images']['count']} test images, "
        said.append(
            f"The Fréchet distance of {samples['count']} samples at w = {row['guidance_scale']:g} to the training "
            f"images is {row['frechet_distance']:.3g} ({floor}{far:.3g} for noise; features: {samples['features']})."
        )
    pixels = samples["memorisation"]["pixels"]
    verdict = "look for copies in the picture" if pixels["share_nearer"] > 0.2 else "no sign of copying"
    said.append(
        f"The nearest training image is {pixels['median']['samples']:.1f} grey levels from a sample and "
        f"{pixels['median']['test_images']:.1f} from a test image (medians), and {pixels['share_nearer']:.0%} of the "
        f"samples are nearer than 95% of test images: {verdict}."
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


def guidance_part(run: Run) -> Part:
    """2.4: samples by class and what the guidance scale does."""
    part, train = Part(run.name), train_command(run)
    part.add_picture(run.folder / "class_grid.png", "samples of every class", train)
    if run.can_guide:
        part.sentences += guidance_sentences(run.report.get("samples", {}).get("by_scale", []))
        part.add_picture(run.folder / "guidance_grid.png", "the same noise at growing guidance scale", train)
        shows = "class accuracy, precision, recall and distance over w"
        part.add_picture(run.folder / "guidance_curve.png", shows, test_command(run))
    return part


def butterflies_part(run: Run) -> Part:
    """2.5: what the butterflies look like."""
    part, conditional = Part(run.name), run.config["class_free_guidance"]
    part.sentences.append(f"At {run.config['image_size']} pixels; the sections above have its figures.")
    name = "class_grid.png" if conditional else "samples.png"
    part.add_picture(run.folder / name, f"samples{' of every species' if conditional else ''}", train_command(run))
    return part


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


def study_part(study: Study) -> Part:
    """2.2 training, 2.3, 2.4: which of the compared settings won, by how much and where."""
    part = Part(f"{study.folder.name}: {', '.join(study.varied)} compared", table=[dict(row) for row in study.rows])
    part.sentences += ranking_sentences(study) + loss_sentences(study)
    if {"schedule", "timesteps"} & set(study.varied):
        part.sentences.append(NOT_COMPARABLE)
    command = "the comparison's command, given again"
    part.add_picture(study.folder / "samples.png", "samples of every run, the same noise in every column", command)
    part.add_picture(study.folder / "curves.png", "losses over the steps, and over log-SNR", command)
    return part


def ranking_sentences(study: Study) -> list[str]:
    """Which runs have the smallest Fréchet distance; bits per dimension where no samples were judged."""
    criterion = "Fréchet distance" if any(row.get("Fréchet distance") for row in study.rows) else "bits/dim"
    known = {
        ", ".join(row[name] for name in study.varied): float(row[criterion]) for row in study.rows if row.get(criterion)
    }
    if len(known) < 2:
        return []
    ranked = sorted(known, key=known.get)
    best = known[ranked[0]]
    rest = ", ".join(f"{known[name]:.3g} for {name} ({known[name] / best:.2g} times that)" for name in ranked[1:])
    if known[ranked[1]] < CLEAR * best:
        return [f"{criterion}: {best:.3g} for {ranked[0]}, {rest}. The first two don't differ clearly."]
    return [f"{ranked[0]} wins with the smallest {criterion}, {best:.3g}; {rest}. Each figure is of a single run."]


def loss_sentences(study: Study) -> list[str]:
    """Which run has the smallest test loss at noise levels that all of them know."""
    curves = {run.name: run.report["losses"]["test"] for run in study.runs}
    low = max(min(curve["log_snr"]) for curve in curves.values())
    high = min(max(curve["log_snr"]) for curve in curves.values())
    said = []
    for log_snr in (-2, 2):
        if len(curves) < 2 or not low <= log_snr <= high:
            continue
        losses = {name: loss_at(curve, log_snr) for name, curve in curves.items()}
        ranked = sorted(losses, key=losses.get)
        values = ", ".join(f"{losses[name]:.3g} for {name} (t = {time_at(curves[name], log_snr)})" for name in ranked)
        clear = losses[ranked[1]] > CLEAR * losses[ranked[0]]
        verdict = f"{ranked[0]} predicts the noise best there" if clear else "no clear difference"
        said.append(f"Test l2 loss at log-SNR {log_snr}, read between the tested times: {values}; {verdict}.")
    return said


def loss_at(curve: dict, log_snr: float) -> float:
    """l2 loss at a log-SNR, between the times that were tested: its logarithm is nearly straight there."""
    return float(np.exp(np.interp(log_snr, curve["log_snr"][::-1], np.log(curve["l2"][::-1]))))


def time_at(curve: dict, log_snr: float) -> int:
    """The time, counted as in the paper, at a log-SNR."""
    return round(float(np.interp(log_snr, curve["log_snr"][::-1], curve["t"][::-1]))) + 1


def sections(runs: list[Run], studies: list[Study]) -> list[Section]:
    """The page, sub-task by sub-task."""
    compare = "python ex2_main.py compare --preset quick --vary"
    train = missing_part("a trained run", "python ex2_main.py --preset quick")
    schedule, null = studies_of(studies, {"schedule"}), studies_of(studies, {"null_token", "p_uncond"})
    training = [study for study in studies if set(study.varied) - {"schedule", "null_token", "p_uncond"}]
    guided = [run for run in runs if run.config["class_free_guidance"]]
    butterflies = [run for run in runs if run.config["dataset"] == "butterflies" or "butterfl" in run.name]
    drawn = [run for run in runs if is_picture(run.folder / "schedules.png")]
    schedules = Part("The schedules")
    for run in drawn[:1]:
        schedules.add_picture(run.folder / "schedules.png", "beta, alpha-bar and log-SNR of each schedule", "")
    return [
        Section("network", "2.1 The network and its training", [tried(network_part, run) for run in runs] or [train]),
        Section("process", "2.2 a-d, f: Noising and denoising", [tried(process_part, run) for run in runs] or [train]),
        Section("quality", "2.2 e: How good is it?", [tried(quality_part, run) for run in runs] or [train]),
        Section(
            "training",
            "2.2 Training with other settings",
            [tried(study_part, study) for study in training]
            or [missing_part("a study of the learning rate", f"{compare} lr=3e-4,1e-3,3e-3")],
        ),
        Section(
            "schedules",
            "2.3 Beta schedules",
            ([schedules] if drawn else [train])
            + (
                [tried(study_part, study) for study in schedule]
                or [missing_part("a comparison of the schedules", f"{compare} schedule=linear,cosine,sigmoid")]
            ),
        ),
        Section(
            "guidance",
            "2.4 Classifier-free guidance",
            (
                [tried(guidance_part, run) for run in guided]
                or [missing_part("a run with classes", "python ex2_main.py --preset quick")]
            )
            + (
                [tried(study_part, study) for study in null]
                or [missing_part("a comparison of null tokens", f"{compare} null_token=learned,zero")]
            ),
        ),
        Section(
            "butterflies",
            "2.5 Butterflies",
            [tried(butterflies_part, run) for run in butterflies]
            or [missing_part("a run on butterflies", "python ex2_main.py --preset butterflies")],
        ),
    ]


def studies_of(studies: list[Study], settings: set[str]) -> list[Study]:
    """The studies that vary one of the settings."""
    return [study for study in studies if settings & set(study.varied)]


def missing_part(what: str, command: str) -> Part:
    """Names what is missing, and the command that makes it."""
    return Part("", missing=[(what, command)])


# ---------------------------------------------------------------------------- pages


def write_page(results_dir: Path) -> None:
    """index.html, which needs no other file and no network, and report.md, which shows the files where they are.

    Raises:
        InputError: nothing was tested yet.
    """
    runs, studies = find_runs(results_dir), find_studies(results_dir)
    if not runs and not studies:
        raise InputError(f"no run in {results_dir}: train one first, for example python ex2_main.py --preset quick")
    content = sections(runs, studies)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(data_uri=data_uri, frames=lambda path: list(frames(path)), figure=figure)
    page = environment.get_template("ex2_report.html").render(sections=content)
    write_atomically(results_dir / "index.html", page.encode("utf-8", "replace"))
    write_atomically(results_dir / "report.md", "\n".join(as_text(content, results_dir)).encode("utf-8", "replace"))


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


def data_uri(path: Path) -> str:
    """A PNG file as the text that puts it into a page."""
    with Image.open(path) as image:
        return as_uri(image.convert("RGB"), colours=64)


def frames(path: Path) -> Iterator[str]:
    """Frames of a GIF, each as `data_uri` of a PNG: a page can't stop a GIF, but it can leaf through pictures."""
    pictures = imageio.imread(path, index=None)
    for i in evenly_spaced(len(pictures), FRAMES):
        yield as_uri(Image.fromarray(pictures[i]), colours=32)


def as_uri(image: Image.Image, colours: int) -> str:
    """An RGB picture as a data URI; a palette makes it a third as large."""
    buffer = io.BytesIO()
    image.quantize(colours).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
                yield f"![{shows}]({quote(path.relative_to(results_dir).as_posix())})\n"
            for what, command in part.missing:
                yield f"Missing: {what}. Made by `{command}`.\n"
