"""The report: sub-tasks in order, sentences that follow from the figures, a page that works without network."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import imageio.v3 as imageio
import pytest
from tiny import TINY

import ex2_main
from ex2.machine import files
from ex2.machine.files import read_json
from ex2.report import page as report_page
from ex2.report.answers import Run
from ex2.report.page import find_runs, find_studies
from ex2.training.log import RunLog


@pytest.fixture(scope="module")
def results(tmp_path_factory, small_shapes):
    """A results folder with a judged run, a dry run and a comparison, and its report."""
    folder = tmp_path_factory.mktemp("results")
    tiny, where = [*TINY, "--class_free_guidance"], ["--results_dir", str(folder)]
    assert ex2_main.main([*tiny, *where, "--run_name", "guided"]) == 0
    assert ex2_main.main(["test", "--checkpoint", str(folder / "guided"), "--eval_samples", "130", "--no_cuda"]) == 0
    assert ex2_main.main([*tiny, *where, "--dry_run"]) == 0
    vary = ["--vary", "schedule=linear,cosine", "--eval_samples", "130"]
    assert ex2_main.main(["compare", *tiny, *where, *vary]) == 0
    assert ex2_main.main(["report", *where]) == 0
    return folder


@pytest.fixture(scope="module")
def page(results):
    return (results / "index.html").read_text(encoding="utf-8")


def test_sub_tasks_come_in_the_order_of_the_sheet(page, results):
    wanted = ["2.1", "2.2 a-d, f", "2.2 e", "2.2 Training", "2.3", "2.4", "2.5"]
    for text, pattern in ((page, r"<h2>(.*?)</h2>"), ((results / "report.md").read_text("utf-8"), r"^## (.*)$")):
        titles = re.findall(pattern, text, re.MULTILINE)
        assert len(titles) == len(wanted)
        assert all(title.startswith(start) for title, start in zip(titles, wanted))


def test_page_needs_no_network_and_shows_the_pictures_that_lie_beside_it(page, results):
    shown = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)
    assert len(shown) >= 12 and all((results / unquote(path)).is_file() for path in shown)
    assert "http" not in re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", page)


def test_every_sub_task_has_its_question_and_its_answer(page):
    questions = re.findall(r'<p class="question">(.*?)</p>', page)
    answers = re.findall(r'<p class="answer">(.*?)</p>', page)
    assert len(questions) == 7 and all(question.endswith("?") for question in questions)
    assert len(answers) >= 5 and all(answer.endswith(".") for answer in answers)
    assert re.findall(r'href="#(\w+)"', page) == re.findall(r'<section id="(\w+)">', page)


def test_every_picture_has_an_alternative_text(page):
    images = re.findall(r"<img [^>]*>", page)
    assert (
        len(images) >= 15
        and len(re.findall(r"<img src=\"data:", page)) == 3
        and all(re.search(r'alt="[^"]{5,}"', image) for image in images)
    )


def test_every_picture_of_a_run_is_on_the_page(results):
    text = (results / "report.md").read_text("utf-8")
    for path in [*(results / "guided").glob("*.png"), *(results / "guided").glob("*.gif")]:
        assert f"](guided/{path.name})" in text
    for path in (results / "compare-schedule").glob("*.png"):
        assert f"](compare-schedule/{path.name})" in text
    linked = re.findall(r"\]\((.*?)\)", text)
    assert linked and all((results / link).is_file() for link in linked)


def test_dry_runs_are_left_out(results):
    assert [run.name for run in find_runs(results)] == ["guided"]
    assert [study.folder.name for study in find_studies(results)] == ["compare-schedule"]
    assert find_studies(results)[0].varied == ["schedule"]


def test_missing_parts_are_named_with_their_command(results, tmp_path):
    text = (results / "report.md").read_text("utf-8")
    assert "Made by `python ex2_main.py compare --preset quick --seeds 3 --vary lr=3e-4,1e-3,3e-3`" in text
    assert "Made by `python ex2_main.py --preset butterflies`" in text
    shutil.copytree(results / "guided", tmp_path / "guided")
    (tmp_path / "guided" / "class_grid.png").unlink()
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    what = "Missing: class_grid.png: Samples of every class, a row for each. Made by `python ex2_main.py --dataset"
    assert what in text
    assert "compare --preset quick --seeds 3 --vary schedule=linear,cosine,sigmoid" in text


def test_commands_stand_as_they_were_called(results):
    """Of a run and of a study the latest, and none twice."""
    called = (results / "guided" / "commands.txt").read_text("utf-8").splitlines()
    assert called[0].startswith("python ex2_main.py --dataset shapes") and called[0].endswith("--run_name guided")
    assert called[1].startswith("python ex2_main.py test --checkpoint") and len(called) == 2
    text = (results / "report.md").read_text("utf-8")
    vary = "--vary schedule=linear,cosine --eval_samples 130"
    assert all(f"Made by `{line}`" in text for line in called) and f"{vary}`" in text
    files.append_command(results / "guided", called[0])
    assert files.read_commands(results / "guided") == called[::-1]
    files.append_command(results / "guided", called[1])
    assert files.read_commands(results / "guided") == called


def test_what_was_refused_made_nothing(copy):
    before = files.read_commands(copy / "guided")
    results = ["--results_dir", str(copy), "--run_name", "guided", "--no_cuda"]
    assert ex2_main.main(["--dataset", "shapes", "--guidance_interval", "0", "1.5", *results]) == 2
    for checkpoint in (copy / "guided", copy / "nowhere"):
        assert ex2_main.main(["test", "--checkpoint", str(checkpoint), "--eval_samples", "5"]) == 2
    assert files.read_commands(copy / "guided") == before


def test_samples_are_not_made_by_a_test_that_judged_none(tmp_path):
    run = Run(tmp_path / "a run", {}, {})
    run.folder.mkdir()
    assert run.command() == run.command(tested=True) == ""
    assert run.test_again == f"python ex2_main.py test --checkpoint '{tmp_path.as_posix()}/a run'"
    for flags in ("--eval_samples 150", "--eval_samples 0"):
        files.append_command(run.folder, f"python ex2_main.py test --checkpoint x {flags}")
    assert run.command(tested=True).endswith("--eval_samples 150")


def test_old_half_written_and_foreign_folders_do_not_stop_the_page(results, tmp_path):
    shutil.copytree(results / "guided", tmp_path / "guided")
    for name, metrics in (("old", '{"losses": {}}'), ("broken", '{"los'), ("untested", None)):
        (tmp_path / name).mkdir()
        shutil.copy(results / "guided" / "config.json", tmp_path / name)
        (tmp_path / name / "log.csv").write_text("step,epoch\n")
        if metrics is not None:
            (tmp_path / name / "test_metrics.json").write_text(metrics)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"other": 1}')
    (tmp_path / "foreign" / "study.json").write_text("[]")
    assert [(run.name, bool(run.report)) for run in find_runs(tmp_path)] == [
        ("broken", False),
        ("guided", True),
        ("old", False),
        ("untested", False),
    ]
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.count("Missing: the figures of this run") == 3


def test_text_from_outside_is_no_markup(results, tmp_path):
    shutil.copytree(results / "guided", tmp_path / "<script>alert(1)<")
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_a_note_in_the_folder_of_a_run_is_on_the_page(copy):
    (copy / "guided" / "note.txt").write_bytes(b"Lossy JPEGs:\nno figure compares <b>with\xff published ones.")
    assert ex2_main.main(["report", "--results_dir", str(copy)]) == 0
    text = (copy / "index.html").read_text("utf-8")
    assert "Lossy JPEGs: no figure compares &lt;b&gt;with\ufffd published ones." in text


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


# ------------------------------------------------------------------ in a browser


def test_frames_of_a_player_are_those_of_the_gif(page, results):
    players = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    forward, reverse, guidance = map(json.loads, players)
    assert len(reverse) == len(imageio.imread(results / "guided" / "reverse.gif", index=None))
    assert len(guidance) == 13 and all(len(set(frames)) == len(frames) for frames in (forward, reverse, guidance))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_slider_and_button_work_in_a_browser_without_errors(page, tmp_path):
    drive = """<script>
      const slider = document.querySelector(".player input");
      const images = [...document.querySelectorAll(".player")[0].querySelectorAll("img")];
      const last = images.map(image => image.src);
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const moved = images.every((image, i) => image.src !== last[i] && image.src.length > 100);
      document.body.dataset.moved = String(moved && images.length === 2);
      const button = document.querySelectorAll(".player")[1].querySelector("button");
      button.click(); document.body.dataset.playing = button.textContent;
      button.click(); document.body.dataset.paused = button.textContent;
    </script></body>"""
    path = tmp_path / "driven.html"
    path.write_text(page.replace("</body>", drive), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60)
    body = re.search(r"<body[^>]*>", done.stdout).group()
    assert 'data-moved="true"' in body and 'data-playing="Pause"' in body and 'data-paused="Play"' in body
    assert "CONSOLE" not in done.stderr


# ------------------------------------------------------------------ what an earlier run left behind


@pytest.fixture
def copy(results, tmp_path):
    """The run and the study in a folder of their own."""
    for name in ("guided", "compare-schedule"):
        shutil.copytree(results / name, tmp_path / name, ignore=shutil.ignore_patterns("ckpt.pt*", "features"))
    return tmp_path


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_may_be_missing_empty_cut_or_of_another_program(copy, monkeypatch):
    """Of the run every file in turn: the page is there, whole, and shows what is left."""
    monkeypatch.setattr(report_page, "frames", lambda path: ["data:,"])  # what takes the time
    contents = (None, b"", b"\x00\xff", b"{}", b"[1, 2]", b'{"losses": 3}', b"a,b\n1,2\n", 0.3, 0.9)
    contents += (
        b'{"runs": null, "varied": 3}',
        b'{"runs": ["schedule=linear"], "varied": [[1]]}',
        b'{"parameters": NaN}',
    )
    try_part = 0
    study = [copy / "compare-schedule" / name for name in ("study.json", "table.csv")]
    for path in [*files_of(copy / "guided"), *study]:
        good = path.read_bytes()
        for content in contents if path.suffix in (".json", ".csv") else (None, b"", 0.5):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(good[: int(len(good) * content)] if isinstance(content, float) else content)
            assert ex2_main.main(["report", "--results_dir", str(copy)]) == 0, (path, content)
            page = (copy / "index.html").read_text("utf-8")
            assert page.rstrip().endswith("</html>") and page.count("<h2>") == 7
            try_part += 1
        path.write_bytes(good)
    assert try_part > 60


def test_an_empty_config_is_named_as_damaged_and_shows_no_defaults(copy, capsys):
    (copy / "guided" / "config.json").write_bytes(b"")
    assert ex2_main.main(["report", "--results_dir", str(copy)]) == 0
    assert f"{copy / 'guided' / 'config.json'} is damaged" in capsys.readouterr().out
    assert "<h3>guided</h3>" not in (copy / "index.html").read_text("utf-8")


def test_json_and_logs_are_read_however_they_were_cut(copy, tmp_path):
    """At every byte."""
    cut = tmp_path / "cut"
    for name, read in (("config.json", read_json), ("test_metrics.json", read_json), ("log.csv", RunLog.read)):
        good = (copy / "guided" / name).read_bytes()
        whole = read(copy / "guided" / name)
        for length in range(len(good)):
            cut.write_bytes(good[:length])
            found = read(cut)
            assert found in ({}, whole) if isinstance(found, dict) else found == whole[: len(found)]
    assert len(whole) >= 2


def test_a_picture_of_no_bytes_leaves_the_page_whole_without_it(copy):
    (copy / "guided" / "class_grid.png").write_bytes(b"")
    assert ex2_main.main(["report", "--results_dir", str(copy)]) == 0
    assert "Missing: class_grid.png" in (copy / "report.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["a#b", "100%", "a b", "x?y", "ü[1](2)"])
def test_links_to_any_run_work(copy, name):
    (copy / "guided").rename(copy / name)
    assert ex2_main.main(["report", "--results_dir", str(copy)]) == 0
    links = re.findall(r"!\[[^]]*\]\((\S+)\)", (copy / "report.md").read_text("utf-8"))
    assert len(links) > 10
    assert all((copy / unquote(link)).is_file() for link in links)
    assert not any(set("#? ()[]") & set(link) for link in links)


def test_figures_of_a_test_survive_damaged_ones_of_an_earlier_call(results, copy):
    shutil.copy(results / "guided" / "ckpt.pt", copy / "guided")
    for content in ("", "[]", '{"samples": 1}', '{"losses": {}}'):
        (copy / "guided" / "test_metrics.json").write_text(content)
        command = ["test", "--checkpoint", str(copy / "guided"), "--eval_samples", "0", "--no_cuda"]
        assert ex2_main.main(command) == 0
        assert json.loads((copy / "guided" / "test_metrics.json").read_text())["losses"]["test"]["l2"]
