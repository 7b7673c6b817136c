"""Everything in a results folder as one page, in the order of the exercise sheet: `index.html` and `report.md`.

This file reads the runs and renders the page; `answers.py` says what is on it. A file that is damaged or of another
program is left out with a line; what is left of it is checked here, so that `answers.py` can rely on it.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ex2.errors import InputError
from ex2.evaluation.tables import as_markdown, format_cell
from ex2.machine.files import read_json, write_atomically
from ex2.report.answers import Run, Section, Study, read_frames, sections
from ex2.settings.config import Config, config_of
from ex2.training.log import RunLog

FRAMES = 17  # of an animation, at most: they are part of the page


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def is_text(value) -> bool:
    return isinstance(value, str)


def is_curve(value) -> bool:
    """Whether losses over the timesteps are whole: growing t, falling log-SNR, and a loss for each."""
    columns = [value.get(name) for name in ("t", "log_snr", "l2", "x_zero_l2")] if isinstance(value, dict) else [None]
    if not all(isinstance(column, list) and column and all(map(is_number, column)) for column in columns):
        return False
    t, log_snr, *losses = columns
    same_length = len(set(map(len, columns))) == 1
    return same_length and t == sorted(t) and log_snr == sorted(log_snr)[::-1] and min(map(min, losses)) >= 0


ROW = "count frechet_distance frechet_distance_at_test_count kid precision recall class_accuracy".split()
ROW = dict.fromkeys(ROW, is_number)
MEMORISATION = {"median": {"samples": is_number, "test_images": is_number}, "fraction_nearer": is_number}
METRICS = {  # what the page takes from test_metrics.json
    "parameters": is_number,
    "classes": is_number,
    "losses": dict.fromkeys(("test", "train", "optimal", "test_unconditional"), is_curve),
    "bits_per_dim": {"beta": {"total": is_number}, "beta_tilde": {"total": is_number}},
    "samples": {
        **{"count": is_number, "features": is_text, "own_scale": is_number, "test_images": ROW, "noise": ROW},
        **{"by_scale": [{"guidance_scale": is_number, **ROW}], "memorisation": {"pixels": MEMORISATION}},
    },
}
REQUIRED = {"count", "features", "own_scale", "test_images", "noise", "by_scale", "guidance_scale"}


def keep_valid(value, shape):
    """The part of `value` that has the shape; None if that is nothing, or lacks what is `REQUIRED` of the shape."""
    if callable(shape):
        return value if shape(value) else None
    if not isinstance(value, type(shape)):
        return None
    if isinstance(shape, list):
        return [kept for entry in value if (kept := keep_valid(entry, shape[0])) is not None] or None
    found = {name: kept for name in shape if (kept := keep_valid(value.get(name), shape[name])) is not None}
    return found if found and not (shape.keys() & REQUIRED) - found.keys() else None


def read_run(folder: Path) -> Run | None:
    """The run in a folder. None for a dry run and, with a message, for settings of another version."""
    content = read_json(folder / "config.json")
    try:
        config = config_of({"config": content}, {}) if content else None
    except ValueError as error:
        print(f"{folder} is left out: {error}")
        return None
    if config is None or config.dry_run:
        return None
    metrics = keep_valid(read_json(folder / "test_metrics.json"), METRICS) or {}
    return Run(folder, config, metrics, RunLog.read(folder / "log.csv"))


def read_study(folder: Path) -> Study:
    """The comparison in a folder; runs without metrics failed."""
    plan = read_json(folder / "study.json")
    names = [name for name in plan["runs"] if is_text(name)] if isinstance(plan.get("runs"), list) else []
    varied = plan["varied"] if isinstance(plan.get("varied"), dict) else {}
    runs = {name: read_run(folder / name) for name in names}
    tested = {name: run if run is not None and run.metrics else None for name, run in runs.items()}
    return Study(folder, [name for name in varied if name in vars(Config())], tested)


def write_page(results_dir: Path) -> None:
    """index.html and report.md, which show the pictures where they are; no network is needed.

    Shows the runs and comparisons directly in `results_dir`, small images first.

    Raises InputError: there is none.
    """
    runs = [run for path in sorted(results_dir.glob("*/config.json")) if (run := read_run(path.parent)) is not None]
    runs.sort(key=lambda run: run.config.image_size)
    studies = [read_study(path.parent) for path in sorted(results_dir.glob("*/study.json"))]
    studies = [study for study in studies if study.varied and any(study.runs.values())]
    if not runs and not studies:
        raise InputError(f"no run in {results_dir}: train one first, for example python ex2_main.py --preset quick")
    live = [folder / "live.html" for folder in (results_dir, *(run.folder for run in runs))]
    live = [(path.relative_to(results_dir).as_posix(), path) for path in live if path.is_file()]
    content = sections(runs, studies, live)
    page = TEMPLATES.get_template("page.html").render(sections=content, link=partial(link, results_dir))
    write_atomically(results_dir / "index.html", page.encode("utf-8", "replace"))
    write_atomically(results_dir / "report.md", "\n".join(as_text(content, results_dir)).encode("utf-8", "replace"))


def link(results_dir: Path, path: Path) -> str:
    """The address of a file, as seen from the page."""
    return quote(path.relative_to(results_dir).as_posix())


def shown_widths(path: Path) -> tuple[int, int]:
    """(wanted, least) width of a picture on the page. Plots of several panels scroll rather than become unreadable."""
    with Image.open(path) as image:
        width, height = image.size
    return (766 if width > 1000 else min(width, 510, 360 * width // height)), (width * 58 // 100 if width > 700 else 0)


def as_data_uris(path: Path) -> Iterator[str]:
    """Frames of an animation, exactly: a page can't stop a GIF, but it can leaf through pictures."""
    frames = read_frames(path)
    for i in np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int):
        frames[i].save(buffer := io.BytesIO(), "webp", lossless=True)
        yield f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters.update(frames=lambda path: list(as_data_uris(path)), widths=shown_widths, format_cell=format_cell)


def escape(text: str) -> str:
    """Text in which Markdown and HTML see no markup."""
    return re.sub(r"[\\`*\[\]|]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


def as_text(content: list[Section], results_dir: Path) -> Iterator[str]:
    """The lines of report.md."""
    for section in content:
        yield f"{'#' if section is content[0] else '##'} {section.title}\n"
        for part in section.parts:
            yield f"{escape(part.text)}\n" if part.text else ""
            if part.table:
                yield as_markdown([{escape(k): escape(format_cell(v)) for k, v in row.items()} for row in part.table])
            for text, path in part.links:
                yield f"[{escape(text)}]({link(results_dir, path)})\n"
            for whose, path in part.pictures:
                yield f"![{escape(whose)}]({link(results_dir, path)})\n"
            for command in part.commands:
                yield f"<code>{escape(command)}</code>\n"
        for command, what in section.missing.items():
            yield f"Missing: {escape('; '.join(what))}. <code>{escape(command)}</code>\n"
        if section is content[0]:
            yield from (f"- **{other.title}** {escape(other.answer)}" for other in content[1:] if other.answer)
            yield ""
