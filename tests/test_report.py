"""The report: sub-tasks in order, sentences that follow from the figures, a page that works without network."""

import json
import re
import shutil
import subprocess

import imageio.v3 as imageio
import numpy as np
import pytest

import ex2_config as cfg
import ex2_data
import ex2_features
import ex2_main
import ex2_report
from ex2_report import Run, Study, find_runs, find_studies, loss_at, samples_sentences, study_part, train_command

TINY = "--dataset shapes --image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --batch_size 100 --epochs 1".split()
TINY += "--eval_images 20 --eval_timesteps 3 --sample_steps 3 --no_cuda --class_free_guidance".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with a judged run, a dry run and a comparison, and its report."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex2_data, "SHAPES_COUNT", {"train": 1000, "test": 200})
        patch.setattr(ex2_features, "CLASSIFIER_EPOCHS", 2)
        where = ["--results_dir", str(folder)]
        assert ex2_main.main([*TINY, *where, "--run_name", "guided", "--schedule", "cosine"]) == 0
        assert (
            ex2_main.main(["test", "--checkpoint", str(folder / "guided"), "--eval_samples", "130", "--no_cuda"]) == 0
        )
        assert ex2_main.main([*TINY, *where, "--dry_run"]) == 0
        vary = ["--vary", "schedule=linear,cosine", "--eval_samples", "130"]
        assert ex2_main.main(["compare", *TINY, *where, *vary]) == 0
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


def test_page_needs_no_other_file_and_no_network(page):
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)


def test_every_picture_has_an_alternative_text(page):
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 15 and all(re.search(r'alt="[^"]{5,}"', image) for image in images)


def test_every_picture_of_a_run_is_on_the_page(results):
    text = (results / "report.md").read_text("utf-8")
    for path in [*(results / "guided").glob("*.png"), *(results / "guided").glob("*.gif")]:
        assert f"](guided/{path.name})" in text
    for path in (results / "compare").glob("*.png"):
        assert f"](compare/{path.name})" in text
    linked = re.findall(r"\]\((.*?)\)", text)
    assert linked and all((results / link).is_file() for link in linked)


def test_dry_runs_are_left_out(results):
    assert [run.name for run in find_runs(results)] == ["guided"]
    assert [study.folder.name for study in find_studies(results)] == ["compare"]
    assert find_studies(results)[0].varied == ["schedule"]


def test_missing_parts_are_named_with_their_command(results, tmp_path):
    text = (results / "report.md").read_text("utf-8")
    assert "Made by `python ex2_main.py compare --preset quick --vary lr=3e-4,1e-3,3e-3`" in text
    assert "Made by `python ex2_main.py --preset butterflies`" in text
    shutil.copytree(results / "guided", tmp_path / "guided")
    (tmp_path / "guided" / "class_grid.png").unlink()
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "Missing: class_grid.png: samples of every class. Made by `python ex2_main.py --run_name guided" in text
    assert "compare --preset quick --vary schedule=linear,cosine,sigmoid" in text


def test_the_command_of_a_run_makes_the_same_run():
    config = cfg.PRESETS["quick"]
    command = train_command(Run(None, json.loads(json.dumps(cfg.dataclasses.asdict(config))), {}))
    args = cfg.parse_args(command.split()[2:])
    assert cfg.Config(**args.given) == config


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 2
    assert "no tested run in" in capsys.readouterr().err


# ------------------------------------------------------------------ sentences


def study_of(distances):
    rows = [{"schedule": name, "Fréchet distance": str(d), "bits/dim": "3"} for name, d in distances.items()]
    runs = []
    for i, name in enumerate(distances):
        curve = {"t": [0, 50, 99], "log_snr": [8.0, 0.0, -8.0], "l2": [0.8, 0.1 * (i + 1), 0.01]}
        runs.append(Run(ex2_report.Path(f"study/schedule={name}"), {}, {"losses": {"test": curve}}))
    return Study(ex2_report.Path("study"), rows, runs)


def test_the_winner_is_the_run_with_the_smallest_distance():
    text = " ".join(study_part(study_of({"linear": 8.0, "cosine": 2.0, "sigmoid": 5.0})).sentences)
    assert "cosine wins with the smallest Fréchet distance, 2; sigmoid 2.5 times that, linear 4 times that." in text
    assert "not comparable" in text
    assert "schedule=linear has the smallest test loss" in text  # of the three curves above


def test_loss_is_read_between_the_tested_times():
    curve = {"t": [0, 50, 99], "log_snr": [8.0, 0.0, -8.0], "l2": [0.8, 0.2, 0.0]}
    assert loss_at(curve, 0) == pytest.approx(0.2)
    assert loss_at(curve, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("share, verdict", [(0.05, "no copies"), (0.5, "look for copies")])
def test_copies_are_suspected_where_samples_are_too_near(share, verdict):
    figures = {"frechet_distance": 2.0}
    pixels = {"median": {"samples": 25.0, "test_images": 26.0}, "share_nearer": share}
    samples = {
        "count": 500,
        "features": "small classifier",
        "by_scale": [{"guidance_scale": 1.0, **figures}],
        "test_images": figures,
        "noise": figures,
        "memorisation": {"pixels": pixels},
    }
    run = Run(None, {"guidance_scale": None, "class_free_guidance": True, "p_uncond": 0.1}, {"samples": samples})
    assert verdict in samples_sentences(run)[1]


# ------------------------------------------------------------------ in a browser


def test_frames_of_a_player_are_those_of_the_gif(page, results):
    players = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(players) == 2
    frames = json.loads(players[1])
    assert len(frames) == len(imageio.imread(results / "guided" / "reverse.gif", index=None))
    assert len(set(frames)) == len(frames)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_slider_and_button_work_in_a_browser_without_errors(page, tmp_path):
    drive = """<script>
      const slider = document.querySelectorAll(".player")[1].querySelector("input");
      const image = document.querySelectorAll(".player")[1].querySelector("img");
      const last = image.src;
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const first = image.src;
      document.body.dataset.moved = String(first !== last && first.length > 100);
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


def test_tables_show_four_digits_and_a_dash_for_nothing():
    assert [ex2_report.figure(v) for v in ("0.123456", None, "", "cosine", 1234.56, np.float64(2))] == [
        "0.1235",
        "-",
        "-",
        "cosine",
        "1235",
        "2",
    ]
