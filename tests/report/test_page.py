"""The page: sub-tasks in order, every file may be damaged, no network, no markup from outside. Runs are made up."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import made_up
import pytest
from made_up import make_run, make_study
from PIL import Image

import ex2_main
from ex2.machine.files import read_json
from ex2.report import answers, metrics
from ex2.report.page import write_page
from ex2.training.log import RunLog

ROOT = Path(__file__).resolve().parents[2]
SUB_TASKS = ["2.1", "2.2 a-d, f", "2.2 e", "2.2 Training", "2.3", "2.4", "2.5"]


@pytest.fixture
def results(tmp_path):
    """Two runs, a dry run and a comparison of which one run failed."""
    make_run(tmp_path / "guided")
    make_run(tmp_path / "plain", pictures=("samples.png",), class_free_guidance=False, image_size=32, dataset="folder")
    make_run(tmp_path / "guided-dry_run", dry_run=True)
    reports = {"linear": made_up.metrics(), "cosine": None, "sigmoid": made_up.metrics()}
    make_study(tmp_path / "compare-schedule", "schedule", reports)
    return tmp_path


def written(folder):
    """(index.html, report.md) of a results folder."""
    write_page(folder)
    return [(folder / name).read_text("utf-8") for name in ("index.html", "report.md")]


# ------------------------------------------------------------------ what is on it


def test_the_page_needs_no_torch():
    code = "import sys; import ex2.report.page; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sub_tasks_come_in_the_order_of_the_sheet(results):
    page, text = written(results)
    for titles in (re.findall(r"<h2>(.*?)</h2>", page), re.findall(r"^## (.*)$", text, re.MULTILINE)):
        assert [title.split(":")[0][: len(start)] for title, start in zip(titles, SUB_TASKS)] == SUB_TASKS
        assert titles[-1] == "How this was made" and len(titles) == len(SUB_TASKS) + 1


def test_pictures_and_a_sentence_for_each_sub_task_open_the_page(results):
    page, text = written(results)
    opening = page[: page.index("<h2>")]
    assert opening.index("guided/class_grid.png") < opening.index("<figure data-player") < opening.index("<ul")
    links = dict(re.findall(r'<li><a href="#(\w+)">.*?</a> (.*?)</li>', opening))
    assert [*links] == re.findall(r'<section id="(\w+)">', page)[1:]
    said = {name: sentence for name, sentence in links.items() if sentence}
    assert len(said) == 6 and all(sentence.endswith(".") and page.count(sentence) == 1 for sentence in said.values())
    assert all(title in text for title in ("- **2.1 The network", "- **2.5 Butterflies and other pictures** plain (32"))


def test_a_page_in_which_a_model_samples_is_linked_first_or_missing(results):
    command = "python ex2_main.py export --checkpoint "
    assert all("a page in which a model samples. " in found and command in found for found in written(results))
    (results / "live.html").write_text("")
    (results / "guided" / "live.html").write_text("")
    page, text = written(results)
    links = ["live.html", "guided/live.html"]
    assert re.findall(r'<a href="(.*?)"', page)[:2] == links and page.index("live.html") < page.index("<figure")
    assert re.findall(r"(?<!!)\[.*?\]\((\S+)\)", text)[:2] == links and command not in page + text


def test_what_explains_a_picture_and_what_made_it_is_said_once(results):
    make_run(results / "another")
    page, text = written(results)
    for caption in ("training.png", "loss_over_t.png", "class_grid.png"):
        assert page.count(f"<figcaption>{answers.CAPTIONS[caption]}</figcaption>") == 1
    (results / "another" / "commands.txt").write_text("python ex2_main.py --a_flag --of_three_lines\n")
    assert all(found.count("--a_flag --of_three_lines") == 1 for found in written(results))
    assert all(found.count("Why does the loss stop falling") == 1 for found in (page, text))


def test_every_picture_is_on_the_page_and_has_an_alternative_text(results):
    page, text = written(results)
    for path in [*results.glob("*/*.png"), *(results / "guided").glob("*.gif")]:
        if "dry_run" not in str(path):
            assert f"]({path.parent.name}/{path.name})" in text
            assert path.suffix == ".gif" or f'src="{path.parent.name}/{path.name}"' in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) > 15 and all(re.search(r'alt="[^"]{5,}"', image) for image in images)
    assert all((results / unquote(link)).is_file() for link in re.findall(r"\]\((\S+)\)", text))


def test_the_page_asks_for_nothing_outside(results):
    page, _ = written(results)
    assert all((results / unquote(path)).is_file() for path in re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page))
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"<[^>]*\son\w+=", page)


def test_what_is_missing_has_its_command(results):
    (results / "guided" / "class_grid.png").unlink()
    page, text = written(results)
    assert f"Missing: class_grid.png of guided. <code>{made_up.TRAIN} --run_name guided</code>" in text
    assert "Missing: a study of the learning rate. <code>python ex2_main.py compare --preset quick --seeds 3" in text
    assert "Made by <code>python ex2_main.py test --checkpoint " in page  # loss_over_t.png of plain
    assert (
        "forward_strip.png of plain" not in text and "nearest.png of plain" not in text
    )  # photographs may not be shown


def test_dry_runs_and_the_showcase_are_no_runs_of_the_user(results):
    make_run(results / "showcase" / "committed")
    assert all("committed" not in found and "guided-dry_run" not in found for found in written(results))
    assert all("committed" in found for found in written(results / "showcase"))


def test_a_run_of_a_comparison_that_failed_is_named(results):
    assert all("not evaluated: schedule=cosine." in found for found in written(results))


def test_a_note_in_the_folder_of_a_run_is_on_the_page(results):
    (results / "guided" / "note.txt").write_bytes(b"Lossy JPEGs:\nno figure compares <b>with\xff published ones.")
    for found in written(results):
        assert "guided: Lossy JPEGs: no figure compares &lt;b&gt;with\ufffd published ones." in found


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_frames_of_the_page_are_those_of_the_animation(results):
    page, _ = written(results)
    films = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    assert len(films) == 3 and all(len(frames) == 5 for frames in films)
    shown = [Image.open(io.BytesIO(base64.b64decode(frame.partition("base64,")[2]))) for frame in films[0]]
    wanted = answers.read_frames(results / "guided" / "reverse.gif")
    assert [frame.convert("RGB").tobytes() for frame in shown] == [frame.tobytes() for frame in wanted]


# ------------------------------------------------------------------ what comes from outside


@pytest.mark.parametrize("name", ["a#b", "100%", "a b", "x?y", "ü[1](2)"])
def test_links_to_any_run_work(tmp_path, name):
    make_run(tmp_path / name)
    page, text = written(tmp_path)
    for links in (re.findall(r"!\[[^]]*\]\((\S+)\)", text), re.findall(r'<img src="(?!data:)([^"]*)"', page)):
        assert len(links) > 10 and all((tmp_path / unquote(link)).is_file() for link in links)
        assert not any(set("#? ()[]") & set(link) for link in links)


def test_names_metrics_notes_and_commands_are_no_markup(tmp_path):
    evil = "<script>alert(1)<`|*[x](y)"
    report = made_up.metrics()
    report["samples"]["features"] = evil
    run = make_run(tmp_path / evil.replace("/", ""), report)
    (run / "note.txt").write_text(evil)
    (run / "commands.txt").write_text(f"python ex2_main.py --run_name '{evil}' `x` && <b>\n")
    page, text = written(tmp_path)
    assert "<script>alert" not in page + text and "&lt;script&gt;alert" in page
    assert set(re.findall(r"<[^>]*>", text)) == {"<code>", "</code>"}
    assert "`" not in text and "[x]" not in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "script" in line]
    assert rows and {line.count("|") for line in rows} <= {
        line.count("|") for line in text.splitlines() if "---" in line
    }


def test_every_file_may_be_missing_empty_cut_or_of_another_program(results):
    """Every file in turn: the page is there, whole, and shows what is left."""
    contents = (None, b"", b"\x00\xff", b"[1, 2]", b"a,b\n1,2\n", 0.3, 0.9)
    contents += (b'{"runs": null, "varied": 3}', b'{"runs": ["schedule=linear", 3, "\\u0000"], "varied": [[1]]}')
    contents += (b'{"runs": ["../guided"], "varied": {"dim": [], "x": []}}', b'{"parameters": NaN, "samples": [1]}')
    tried = 0
    study = results / "compare-schedule"
    for path in [*(results / "guided").iterdir(), *study.glob("*.*"), *(study / "schedule=linear").iterdir()]:
        good = path.read_bytes()
        for content in contents if path.suffix in (".json", ".csv") else (None, b"", 0.5):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(good[: int(len(good) * content)] if isinstance(content, float) else content)
            page, text = written(results)
            assert page.rstrip().endswith("</html>") and page.count("<h2>") == 8, (path, content)
            assert "plain (32 pixels): the mean l2 loss" in text, (path, content)
            tried += 1
        path.write_bytes(good)
    assert tried > 100


def test_old_and_untested_runs_say_what_is_missing(results):
    for name, content in (("old", '{"losses": {}}'), ("broken", '{"los'), ("empty", "")):
        (make_run(results / name) / "test_metrics.json").write_text(content)
    (results / "foreign").mkdir()
    (results / "foreign" / "config.json").write_text('{"other": 1}')
    _, text = written(results)
    assert all(f"Missing: metrics of {name}." in text for name in ("old", "broken", "empty")) and "foreign" not in text


def test_a_fault_of_the_program_is_not_called_a_damaged_file(results, monkeypatch):
    def quality_answer(run):
        raise KeyError("of a programmer")

    monkeypatch.setattr(answers, "quality_answer", quality_answer)
    with pytest.raises(KeyError, match="of a programmer"):
        write_page(results)


def test_an_empty_config_is_named_as_damaged_and_shows_no_defaults(results, capsys):
    (results / "guided" / "config.json").write_bytes(b"")
    page, text = written(results)
    assert f"{results / 'guided' / 'config.json'} is damaged" in capsys.readouterr().out
    assert "guided" not in page + text


def test_json_and_logs_are_read_however_they_were_cut(results, tmp_path):
    """At every byte."""
    cut = tmp_path / "cut"
    for name, read in (("config.json", read_json), ("log.csv", RunLog.read)):
        good = (results / "guided" / name).read_bytes()
        whole = read(results / "guided" / name)
        for length in range(len(good)):
            cut.write_bytes(good[:length])
            found = read(cut)
            assert found in ({}, whole) if isinstance(found, dict) else found == whole[: len(found)]
    assert len(whole) >= 2


@pytest.mark.parametrize("content", ["", "[]", '{"samples": 1}', '{"losses": {}}'])
def test_metrics_survive_damaged_ones_of_an_earlier_call(tmp_path, content):
    config = made_up.config(results_dir=str(tmp_path))
    config.run_dir.mkdir()
    (config.run_dir / "test_metrics.json").write_text(content)
    metrics.write_metrics(made_up.metrics(), config, made_up.log_rows())
    assert read_json(config.run_dir / "test_metrics.json") == made_up.metrics()


# ------------------------------------------------------------------ in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_slider_button_and_wide_pictures_work_in_a_browser_without_errors(results, tmp_path):
    Image.new("RGB", (1320, 396)).save(results / "guided" / "training.png")
    page, _ = written(results)
    drive = """<script>addEventListener("load", () => {
      document.querySelector("main").style.width = "388px";  // of a window of 420
      const player = document.querySelector("[data-player]"), image = player.querySelector("img");
      const [slider, button] = ["input", "button"].map(name => player.querySelector(name)), last = image.src;
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      document.body.dataset.moved = String(image.src !== last && image.src.startsWith("data:"));
      button.click(); document.body.dataset.playing = button.textContent;
      button.click(); document.body.dataset.paused = button.textContent;
      const wide = document.querySelector('img[src$="training.png"]');
      const box = wide.parentElement;
      document.body.dataset.scrolls = String(wide.clientWidth > 700 && box.clientWidth <= 388);
      document.body.dataset.overflow = String(document.querySelector("main").scrollWidth > 420);
    })</script></body>"""
    path = results / "driven.html"
    path.write_text(page.replace("</body>", drive), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60)
    body = re.search(r"<body[^>]*>", done.stdout).group()
    wanted = {"moved": "true", "playing": "Pause", "paused": "Play", "scrolls": "true", "overflow": "false"}
    assert dict(re.findall(r'data-(\w+)="(\w+)"', body)) == wanted
    assert "CONSOLE" not in done.stderr
