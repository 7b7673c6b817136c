"""Everything under `results/` as one page, in the order of the exercise sheet: `index.html` and `report.md`.

Each sub-task has its question, an answer, pictures, metrics and the command that made them.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable
from urllib.parse import quote

import imageio.v3 as imageio
from jinja2 import Environment, FileSystemLoader
from PIL import Image

import ex2.report.answers as answers
from ex2.errors import InputError
from ex2.evaluation.tables import as_markdown, format_cell
from ex2.machine.files import read_json, write_atomically
from ex2.report.answers import Part, Run, Study
from ex2.settings.config import config_of
from ex2_diffusion import evenly_spaced

TEMPLATES = Path(__file__).parent
FRAMES = 17  # of an animation, at most: they are part of the page
NO_LINK = str.maketrans("[]", "()")  # in Markdown, what stands in brackets may be a link
NEEDED = ("parameters", "losses", "bits_per_dim")  # of test_metrics.json


def read_run(folder: Path) -> Run | None:
    """The run in a folder. None for a dry run and, with a message, for settings of another version."""
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
    """The runs in `folder`, small images first, then by name."""
    runs = (read_run(path.parent) for path in sorted(folder.glob("*/config.json")))
    return sorted((run for run in runs if run is not None), key=lambda run: run.config["image_size"])


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


def try_part(make: Callable[[Run | Study], Part], subject: Run | Study) -> Part:
    """What `make` says of a run or a study. If its files are damaged, the part says just that."""
    try:
        return make(subject)
    except Exception as error:  # whatever a foreign file leads to
        print(f"{subject.folder}: left out of '{make.__name__}' ({type(error).__name__}: {error})")
        what = "what its damaged files, or those of another version, should show"
        return Part(subject.folder.name, missing=[(what, "the command that made them, given again")])


def answer_of(make: Callable[[Run | Study], str], subjects: Sequence[Run | Study]) -> str:
    """The answer of the first run or study; "" if its figures are missing or damaged."""
    for subject in subjects[:1]:
        with suppress(Exception):  # `try_part` names what is damaged
            return make(subject)
    return ""


@dataclass(frozen=True)
class Section:
    """One sub-task of the sheet."""

    anchor: str
    title: str
    question: str
    answer: str
    parts: list[Part]


def sections(runs: list[Run], studies: list[Study]) -> list[Section]:
    """The page, sub-task by sub-task."""
    compare, quick = "python ex2_main.py compare --preset quick --seeds 3 --vary", "python ex2_main.py --preset quick"
    three = "schedule=linear,cosine,sigmoid"
    schedule, null = studies_of(studies, {"schedule"}), studies_of(studies, {"null_token", "p_uncond"})
    training = [study for study in studies if set(study.varied) - {"schedule", "null_token", "p_uncond"}]
    guided = [run for run in runs if run.config["class_free_guidance"]]
    butterflies = [run for run in runs if run.config["dataset"] == "butterflies" or "butterfl" in run.name]
    embedding, schedules = Part("The time, as the network gets it"), Part("The schedules")
    for run in [run for run in runs if answers.is_picture(run.folder / "schedules.png")][:1]:
        embedding.show(run.folder / "time_embedding.png", run.command())
        schedules.show(run.folder / "schedules.png", run.command())
    if not schedules.pictures:
        schedules.missing.append(("their curves", quick))
    process_films = answers.side_by_side(
        "Side by side, from noise (left end of the slider) to images", runs, ("forward.gif", "reverse.gif")
    )
    guidance_films = answers.side_by_side("Guidance, from w = -1 to 5", guided, ("guidance.gif",))

    def parts(make, subjects, missing: str, command: str) -> list[Part]:
        return [try_part(make, subject) for subject in subjects] or [Part("", missing=[(missing, command)])]

    def answer(make, *groups) -> str:
        return " ".join(filter(None, (answer_of(make, subjects) for subjects in groups)))

    return [
        Section(
            "network",
            "2.1 The network and its training",
            "What does the network look like, and how does it know the time?",
            answer(answers.network_answer, runs),
            [embedding, *parts(answers.network_part, runs, "a trained run", quick)],
        ),
        Section(
            "process",
            "2.2 a-d, f: Noising and denoising",
            "How does an image become noise, and noise an image?",
            answer(answers.process_answer, runs),
            [process_films, *parts(answers.process_part, runs, "a trained run", quick)],
        ),
        Section(
            "quality",
            "2.2 e: How good is it?",
            "How good is the model on test images, and how good are its samples?",
            answer(answers.quality_answer, runs),
            parts(answers.quality_part, runs, "a trained run", quick),
        ),
        Section(
            "training",
            "2.2 Training with other settings",
            "What do the learning rate and the number of timesteps change?",
            answer(answers.study_answer, *([study] for study in training)),
            parts(answers.study_part, training, "a study of the learning rate", f"{compare} lr=3e-4,1e-3,3e-3"),
        ),
        Section(
            "schedules",
            "2.3 Beta schedules",
            "Which schedule trains best, and what do they look like?",
            answer(answers.study_answer, schedule),
            [schedules, *parts(answers.study_part, schedule, "a comparison of the schedules", f"{compare} {three}")],
        ),
        Section(
            "guidance",
            "2.4 Classifier-free guidance",
            "What do the class and the guidance scale w do, and which null token?",
            f"{answer(answers.guidance_answer, guided)} {answer(answers.study_answer, null)}".strip(),
            [guidance_films, *parts(answers.guidance_part, guided, "a run with classes", quick)]
            + parts(answers.study_part, null, "a comparison of null tokens", f"{compare} null_token=learned,zero"),
        ),
        Section(
            "butterflies",
            "2.5 Butterflies",
            "Does it work for butterflies?",
            answer(answers.butterflies_answer, butterflies),
            parts(
                answers.butterflies_part, butterflies, "a run on butterflies", "python ex2_main.py --preset butterflies"
            ),
        ),
    ]


def studies_of(studies: list[Study], settings: set[str]) -> list[Study]:
    """The studies that vary one of the settings."""
    return [study for study in studies if settings & set(study.varied)]


def write_page(results_dir: Path) -> None:
    """index.html and report.md, which show the pictures where they are; no network is needed.

    Raises InputError: nothing was tested yet.
    """
    runs, studies = find_runs(results_dir), find_studies(results_dir)
    if not runs and not studies:
        raise InputError(f"no run in {results_dir}: train one first, for example python ex2_main.py --preset quick")
    content = sections(runs, studies)
    for section in content:
        section.parts[:] = [part for part in section.parts if not part.is_empty]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        link=partial(link, results_dir), frames=lambda path: list(frames(path)), format_cell=format_cell
    )
    page = environment.get_template("page.html").render(sections=content)
    write_atomically(results_dir / "index.html", page.encode("utf-8", "replace"))
    write_atomically(results_dir / "report.md", "\n".join(as_text(content, results_dir)).encode("utf-8", "replace"))


def link(results_dir: Path, path: Path) -> str:
    """The address of a file, as seen from the page."""
    return quote(path.relative_to(results_dir).as_posix())


def frames(path: Path) -> Iterator[str]:
    """Frames of a GIF as data URIs: a page can't stop a GIF, but it can leaf through pictures.

    The forward process is turned round, so that all animations of the process start with noise.
    """
    pictures = imageio.imread(path, index=None)
    pictures = pictures[::-1] if path.name == "forward.gif" else pictures
    for i in evenly_spaced(len(pictures), FRAMES):
        image = Image.fromarray(pictures[i])
        palette, lossy = io.BytesIO(), io.BytesIO()
        image.quantize(32).save(palette, "png", optimize=True)
        image.save(lossy, "webp", quality=75)
        kind, buffer = min(("png", palette), ("webp", lossy), key=lambda entry: entry[1].tell())
        yield f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_text(content: Iterable[Section], results_dir: Path) -> Iterator[str]:
    """The lines of report.md."""
    yield "# Denoising diffusion: results\n"
    for section in content:
        yield f"## {section.title}\n"
        yield f"*{section.question}* {section.answer}\n"
        for part in section.parts:
            if part.title:
                yield f"### {part.title}\n"
            if part.sentences:
                yield " ".join(part.sentences) + "\n"
            if part.table:
                yield as_markdown(part.table)
            for path, shows in (*part.animations, *part.pictures):
                yield f"![{shows.translate(NO_LINK)}]({link(results_dir, path)})\n"
            for command in part.commands:
                yield f"Made by `{command}`\n"
            for what, command in part.missing:
                yield f"Missing: {what}. Made by `{command}`.\n"
