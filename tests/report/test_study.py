"""The training study: the grid of runs, going on after an interruption, and what comes out (2.2, 2.3, 2.4)."""

import csv
import json
import os
import re
import shutil

import imageio.v3 as imageio
import pytest
import torch
from tiny import TINY

import ex2_main
from ex2.data import shapes
from ex2.errors import InputError, Interrupted
from ex2.evaluation import samples, tables
from ex2.evaluation.tables import as_markdown
from ex2.report import study
from ex2.report.study import grid_of_runs
from ex2.settings.build import build_model, load_data
from ex2.settings.cli import parse_vary
from ex2.settings.config import Config, config_of
from ex2.training import run

TWO_EPOCHS = [*TINY, "--schedule", "linear", "--epochs", "2", "--eval_samples", "130"]
VARY = ["compare", *TWO_EPOCHS, "--vary", "schedule=linear,cosine"]
pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.fixture(scope="module")
def few_shapes(small_shapes):
    """Enough for features of width 128."""
    shapes.SHAPES_COUNT.update(train=300, test=140)  # the dict that `small_shapes` takes away again


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_shapes):
    """The folder of a comparison that ran through."""
    results = tmp_path_factory.mktemp("results")
    assert ex2_main.main([*VARY, "--results_dir", str(results)]) == 0
    return results / "compare-schedule"


def table(folder):
    """Rows of table.csv without what a clock measured."""
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# ------------------------------------------------------------------ the grid


def test_values_get_the_type_of_their_setting():
    varied = parse_vary(
        ["schedule=linear,cosine", "lr=1e-3,3e-3", "timesteps=100,1000", "class_free_guidance=true,false"]
    )
    assert varied == {
        "schedule": ["linear", "cosine"],
        "lr": [0.001, 0.003],
        "timesteps": [100, 1000],
        "class_free_guidance": [True, False],
    }


def test_several_settings_make_every_combination():
    base = Config(results_dir="out", run_name="study", class_free_guidance=True)
    runs = grid_of_runs(base, {"null_token": ["learned", "zero"], "p_uncond": [0.1, 0.2]})
    assert list(runs) == [
        "null_token=learned,p_uncond=0.1",
        "null_token=learned,p_uncond=0.2",
        "null_token=zero,p_uncond=0.1",
        "null_token=zero,p_uncond=0.2",
    ]
    assert [(config.null_token, config.p_uncond) for config in runs.values()][2] == ("zero", 0.1)
    assert all(str(config.run_dir) == f"out/study/{name}" for name, config in runs.items())
    assert {config.seed for config in runs.values()} == {0}


def test_more_seeds_leave_the_runs_that_are_there():
    base = Config(results_dir="out", run_name="study", seed=7)
    once, thrice = (grid_of_runs(base, {"lr": [0.1, 0.2]}, seeds) for seeds in (1, 3))
    assert list(thrice) == ["lr=0.1", "lr=0.1,seed=8", "lr=0.1,seed=9", "lr=0.2", "lr=0.2,seed=8", "lr=0.2,seed=9"]
    assert once.items() <= thrice.items()
    assert [config.seed for config in thrice.values()] == [7, 8, 9] * 2
    assert [config.data_seed for config in thrice.values()] == [None, 7, 7] * 2


def test_a_run_of_another_seed_has_the_same_split_when_it_is_tested_alone(tmp_path):
    base = Config(dataset="shapes", image_size=8, results_dir=str(tmp_path))
    runs = grid_of_runs(base, {"lr": [0.1]}, 2)
    first, second = (load_data(config).val.images for config in runs.values())
    assert torch.equal(first, second)
    assert not torch.equal(first, load_data(Config(dataset="shapes", image_size=8, seed=1)).val.images)


def test_a_failed_seed_is_left_out_of_the_mean_and_of_the_number_of_runs():
    row = {"lr": 0.1, "w": 1.0, "bits/dim": 3.0}
    failed = {"lr": 0.1, "seed": 0, "bits/dim": None, "w": None}
    rows = [failed, *({"lr": 0.1, "seed": seed, "bits/dim": 3.0 + seed, "w": 1.0} for seed in (1, 2))]
    rows += [{**failed, "lr": 0.2, "seed": seed} for seed in (0, 1, 2)]
    assert tables.summarise_seeds(rows, ["lr"]) == [
        {"lr": 0.1, "runs": 2, "bits/dim": "4.5 ± 6.4", "w": row["w"]},
        {"lr": 0.2, "runs": 0, "bits/dim": None, "w": None},
    ]


@pytest.mark.parametrize("seeds", [0, 11])
def test_there_is_an_interval_for_two_to_ten_seeds(seeds):
    with pytest.raises(InputError, match="--seeds must be at least 1 and at most 10"):
        grid_of_runs(Config(), {"lr": [0.1]}, seeds)


@pytest.mark.parametrize(
    "vary, message",
    [
        ("schedule", "give setting=value"),
        ("schedule=", "give setting=value"),
        ("seed=1,2", "give setting=value"),
        ("image_size=8,16", "give setting=value"),
        ("dim_mults=1,2", "give setting=value"),
        ("lr=fast,slow", "every value must be of type float"),
        ("class_free_guidance=1,0", "every value must be of type bool"),
        ("lr=0.1,0.10", "a value is there twice"),
        ("schedule=linear,square", "--schedule must be one of"),
        ("timesteps=0,10", "--timesteps must be at least 1"),
    ],
)
def test_what_cannot_be_varied_is_one_line(tmp_path, capsys, vary, message):
    assert ex2_main.main(["compare", *TWO_EPOCHS, "--results_dir", str(tmp_path / "r"), "--vary", vary]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("r/compare*/*/ckpt.pt"))


def test_a_setting_named_twice_is_refused():
    with pytest.raises(InputError, match="names lr twice"):
        parse_vary(["lr=0.1", "lr=0.2"])


# ------------------------------------------------------------------ what comes out


def test_every_run_has_its_row_and_its_folder(finished):
    rows = table(finished)
    assert [row["schedule"] for row in rows] == ["linear", "cosine"]
    for row in rows:
        report = json.loads((finished / f"schedule={row['schedule']}" / "test_metrics.json").read_text())
        assert float(row["Fréchet distance"]) == report["samples"]["by_scale"][0]["frechet_distance"]
        assert float(row["loss near 0.5 T"]) == report["losses"]["test"]["l2"][1]
        bounds = [report["bits_per_dim"][name]["total"] for name in ("beta", "beta_tilde")]
        assert float(row["bits/dim"]) == min(bounds)
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert text.startswith("| schedule | loss near 0.1 T |") and "are not comparable" in text
    assert imageio.imread(finished / "samples.png").shape[1] > 10 * 64
    assert (finished / "curves.png").is_file()


def test_finished_runs_are_neither_trained_nor_judged_again(finished, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("schedule=*/*") if path.name != "config.json"}
    assert ex2_main.main([*VARY, "--results_dir", str(finished.parent)]) == 0
    assert "epoch 2/2" not in capsys.readouterr().out
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"log.csv"}  # rewritten with the same rows


class AnyJudge:
    """Stands for the judge of the runs: known by the description of its features."""

    scales = ()

    def __init__(self, description, count=130):
        self.extractor, self.description, self.count = self, description, count


@pytest.mark.parametrize(
    "change, count, same",
    [
        ({}, 130, True),
        ({}, 200, False),
        ({"guidance_scale": 0.0}, 130, True),
        ({"sampler": "ddim"}, 130, False),
        ({"sample_steps": 2}, 130, False),
        ({"eval_images": 30}, 130, False),
        ({"eval_timesteps": 4}, 130, False),
        ({"seed": 5}, 130, False),
    ],
)
def test_figures_of_something_else_are_made_anew(finished, change, count, same):
    settings = json.loads((finished / "schedule=linear" / "config.json").read_text())
    features = json.loads((finished / "schedule=linear" / "test_metrics.json").read_text())["samples"]["features"]
    config = config_of({"config": settings}, change)
    assert study.is_evaluated(config, AnyJudge(features, count)) == same
    assert not study.is_evaluated(config, AnyJudge("others", count))


def test_figures_at_other_times_are_made_anew(finished, monkeypatch):
    report = json.loads((finished / "schedule=linear" / "test_metrics.json").read_text())
    settings = json.loads((finished / "schedule=linear" / "config.json").read_text())
    config, evaluator = config_of({"config": settings}, {}), AnyJudge(report["samples"]["features"])
    assert study.is_evaluated(config, evaluator)
    monkeypatch.setattr(samples, "SPACING", 1.0)
    assert not study.is_evaluated(config, evaluator)


def test_figures_of_the_raw_weights_are_made_anew(finished, tmp_path):
    settings = json.loads((finished / "schedule=linear" / "config.json").read_text())
    config = config_of({"config": settings}, {"results_dir": str(tmp_path), "run_name": "copy"})
    shutil.copytree(finished / "schedule=linear", tmp_path / "copy")
    report = json.loads((tmp_path / "copy" / "test_metrics.json").read_text())
    evaluator = AnyJudge(report["samples"]["features"])
    assert study.is_evaluated(config, evaluator)
    (tmp_path / "copy" / "test_metrics.json").write_text(json.dumps({**report, "weights": "raw"}))
    assert not study.is_evaluated(config, evaluator)


def test_a_run_that_went_on_training_is_judged_anew(tmp_path):
    config = Config(results_dir=str(tmp_path), run_name="x")
    config.run_dir.mkdir()
    (config.run_dir / "test_metrics.json").write_text("{}")
    (config.run_dir / "ckpt.pt").write_bytes(b"")
    os.utime(config.run_dir / "test_metrics.json", (1, 1))
    assert not study.is_evaluated(config, None)


def test_killed_in_its_second_run_and_started_again_it_ends_with_the_same_table(finished, tmp_path, monkeypatch):
    epochs, real = [], run.train

    def train(model, loader, optimizer, diffusor, epoch, *args, **hooks):
        epochs.append(epoch)
        if len(epochs) == 4:
            raise Interrupted(2)
        return real(model, loader, optimizer, diffusor, epoch, *args, **hooks)

    monkeypatch.setattr(run, "train", train)
    command = [*VARY, "--results_dir", str(tmp_path)]
    assert ex2_main.main(command) == 130
    assert ex2_main.main(command) == 0
    assert epochs == [0, 1, 0, 1, 1]  # the first run is kept, the second goes on with its second epoch
    assert table(tmp_path / "compare-schedule") == table(finished)


def test_a_run_that_fails_leaves_its_row_empty_and_the_others_in_place(tmp_path, capsys):
    command = [
        "compare",
        *TWO_EPOCHS,
        "--vary",
        "lr=1e-3,1e8,1e-4",
        "--results_dir",
        str(tmp_path),
        "--eval_samples",
        "0",
    ]
    assert ex2_main.main(command) == 1
    assert "lr=100000000.0: the loss or its gradient is not finite" in capsys.readouterr().err
    rows = table(tmp_path / "compare-lr")
    assert [row["lr"] for row in rows] == ["0.001", "100000000.0", "0.0001"]
    assert [bool(row["bits/dim"]) for row in rows] == [True, False, True]
    assert "lr=100000000.0 failed" in (tmp_path / "compare-lr" / "table.md").read_text(encoding="utf-8")


def test_a_combination_that_cannot_be_is_refused_before_any_training(tmp_path, capsys):
    for vary, message in (("timesteps=30,5", "timesteps=5: 5 timesteps are too few"), ("dim=8,9", "dim=9: ")):
        command = ["compare", *TWO_EPOCHS, "--vary", vary, "--results_dir", str(tmp_path), "--eval_samples", "0"]
        assert ex2_main.main(command) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("*/*/ckpt.pt"))


@pytest.mark.parametrize("other", [{"null_token": "zero"}, {"class_free_guidance": False}])
def test_compared_models_start_from_the_same_weights(other):
    states = []
    for changes in ({}, other):
        torch.manual_seed(0)
        config = Config(**{"dim": 8, "class_free_guidance": True, **changes})
        states.append(build_model(config, 3).state_dict())
    shared = set(states[0]) & set(states[1]) - {"null_token"}
    assert len(shared) > 100 and all(torch.equal(states[0][name], states[1][name]) for name in shared)


def test_intervals_are_those_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    for n, quantile in tables.T_QUANTILES.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, n - 1), abs=6e-4)
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    assert tables.mean_and_interval(values) == f"{7 / 3:.3g} ± {(high - low) / 2:.2g}"


def test_means_are_over_the_seeds_of_one_setting_and_scale():
    rows = [
        {"lr": lr, "seed": seed, "bits/dim": 3, "loss": lr * 10 + seed, "w": w, "recall": w + lr, "seconds": ""}
        for lr in (0.1, 0.2)
        for seed in (0, 2)
        for w in (0.0, 3.0)
    ]
    summary = tables.summarise_seeds(rows, ["lr"])
    assert [(row["lr"], row["w"], row["runs"]) for row in summary] == [
        (0.1, 0.0, 2),
        (0.1, 3.0, 2),
        (0.2, 0.0, 2),
        (0.2, 3.0, 2),
    ]
    assert [row["loss"] for row in summary] == ["2 ± 13", "2 ± 13", "3 ± 13", "3 ± 13"]
    assert [row["recall"] for row in summary] == ["0.1 ± 0", "3.1 ± 0", "0.2 ± 0", "3.2 ± 0"]
    assert tables.summarise_seeds(rows[:1], ["lr"]) == [
        {"lr": 0.1, "bits/dim": 3.0, "loss": 1.0, "w": 0.0, "recall": 0.1, "seconds": None}
    ]


def test_a_study_of_seeds_and_scales_has_a_row_for_each(tmp_path):
    command = ["compare", *TINY, "--eval_samples", "130", "--results_dir", str(tmp_path)]
    command += ["--class_free_guidance", "--vary", "null_token=learned,zero", "--seeds", "2", "--eval_scales", "2"]
    assert ex2_main.main(command) == 0
    folder = tmp_path / "compare-null_token"
    rows = table(folder)
    assert len(rows) == 2 * 2 * 2  # settings, seeds, and scales: the one given and the run's own
    assert [row["w"] for row in rows[:2]] == ["1.0", "2.0"] and {row["seed"] for row in rows} == {"0", "1"}
    text = (folder / "table.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (learned|zero) +\| 2 ", text, re.MULTILINE)
    assert rows.count("learned") == rows.count("zero") == 2 and text.count("±") >= 4
    assert json.loads((folder / "study.json").read_text())["runs"] == [
        "null_token=learned",
        "null_token=learned,seed=1",
        "null_token=zero",
        "null_token=zero,seed=1",
    ]


def test_markdown_of_figures():
    rows = [{"lr": 0.001, "accuracy": None, "steps": 12345}, {"lr": 0.02, "accuracy": 0.98765, "steps": 1}]
    assert as_markdown(rows) == (
        "| lr    | accuracy | steps |\n"
        "| ----- | -------- | ----- |\n"
        "| 0.001 | -        | 12345 |\n"
        "| 0.02  | 0.9877   | 1     |\n"
    )
