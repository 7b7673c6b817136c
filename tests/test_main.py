"""The program as a user calls it: every command, exit codes, files, one clear line for what goes wrong."""

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stdout

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tiny import ROOT, TINY, rejected, without_evaluation

import ex2_main
import ex2_train
from ex2.evaluation import evaluate as evaluation
from ex2.machine import files
from ex2.report import metrics
from ex2.training import run as training_run
from ex2.training.log import RunLog

pytestmark = pytest.mark.usefixtures("small_shapes")
EVAL_FEW = ["--eval_images", "5", "--eval_samples", "0", "--no_cuda"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional run, with all that comes after the training; what it said, in said.txt."""
    results, said = tmp_path_factory.mktemp("results"), io.StringIO()
    with redirect_stdout(said):
        assert ex2_main.main([*TINY, "--results_dir", str(results), "--class_free_guidance", "--run_name", "cond"]) == 0
    (results / "said.txt").write_text(said.getvalue())
    return results / "cond"


@pytest.fixture(scope="module")
def dry(tmp_path_factory, small_shapes):
    """The folder of a dry run without classes."""
    results = tmp_path_factory.mktemp("dry")  # at T = 10 linear and sigmoid schedules don't exist
    assert ex2_main.main([*TINY, "--timesteps", "10", "--results_dir", str(results), "--dry_run"]) == 0
    return results / "DDPM-dry_run"


def test_train_writes_every_file_of_the_run(run):
    names = {path.name for path in run.iterdir()}
    curves = {f"{name}.png" for name in ("training", "loss_over_t", "bits_per_dim", "schedules", "time_embedding")}
    pictures = {"forward_strip.png", "forward.gif", "reverse_strip.png", "reverse.gif", "x_zero_strip.png"}
    guidance = {"class_grid.png", "guidance_grid.png", "guidance.gif", "guidance_exact.png"}
    files = {"commands.txt", "config.json", "log.csv", "ckpt.pt", "test_metrics.json"}
    assert names - {".lock"} == curves | pictures | guidance | files
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert int(rows[-1]["step"]) == 9 and float(rows[-1]["val_loss"]) > 0
    report = json.loads((run / "test_metrics.json").read_text())
    assert report["losses"]["test"]["t"] == [0, 14, 29] and report["losses"]["val"]["images"] == 20
    assert report["weights"] == "ema" and 0 <= report["class_accuracy"]["accuracy"] <= 1
    assert json.loads((run / "config.json").read_text())["flip"] is False


def test_unconditional_run_has_a_grid_without_class_names(dry):
    names = {path.name for path in dry.iterdir()}
    assert "samples.png" in names and "class_grid.png" not in names
    assert "class_accuracy" not in json.loads((dry / "test_metrics.json").read_text())


def test_start_says_steps_and_time(run):
    said = (run.parent / "said.txt").read_text()
    assert "9 optimiser steps of 100 images;" in said and "3 steps of 100 images are left: about" in said


def test_test_repeats_the_figures_of_the_training_run(run, capsys):
    before = json.loads((run / "test_metrics.json").read_text())
    assert ex2_main.main(["test", "--checkpoint", str(run), "--no_cuda", "--eval_samples", "0"]) == 0
    assert json.loads((run / "test_metrics.json").read_text()) == before
    assert "test l2" in capsys.readouterr().out


def test_sample_writes_the_chosen_classes_and_a_grid(run, tmp_path):
    command = ["sample", "--no_cuda", "--checkpoint", str(run / "ckpt.pt"), "--classes", "moon", "3", "--n_images", "5"]
    assert ex2_main.main([*command, "--out", str(tmp_path), "--sample_batch", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["0000_moon.png", "0001_diamond.png", "0002_moon.png", "0003_diamond.png", "0004_moon.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commands.txt", "grid.png", "images"]
    assert imageio.imread(tmp_path / "images" / names[0]).shape == (8, 8, 3)
    again = tmp_path.with_name("again")
    assert ex2_main.main([*command, "--out", str(again), "--sample_batch", "5"]) == 0
    first, second = (imageio.imread(folder / "images" / names[1]).astype(int) for folder in (tmp_path, again))
    assert np.abs(first - second).max() <= 1


def test_several_guidance_scales_start_from_the_same_noise(run, tmp_path):
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "3", "--classes", "moon", "star"]
    assert ex2_main.main([*command, "--out", str(tmp_path / "all"), "--guidance_scale", "-1", "0", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["commands.txt", "guidance_grid.png", "w=-1", "w=0", "w=2"]
    assert ex2_main.main([*command, "--out", str(tmp_path / "one"), "--guidance_scale", "2"]) == 0
    for name in ("0000_moon.png", "0001_star.png", "0002_moon.png"):
        alone, together = (imageio.imread(tmp_path / folder / "images" / name) for folder in ("one", "all/w=2"))
        assert np.array_equal(alone, together)
        assert not np.array_equal(alone, imageio.imread(tmp_path / "all" / "w=0" / "images" / name))
    # Without a class, two images of different classes from the same noise would be one.
    free = imageio.imread(tmp_path / "all" / "w=-1" / "images" / "0000_moon.png")
    assert ex2_main.main([*command[:-2], "ring", "--out", str(tmp_path / "ring"), "--guidance_scale", "-1"]) == 0
    assert np.array_equal(free, imageio.imread(tmp_path / "ring" / "images" / "0000_ring.png"))


def test_samples_start_from_an_image_at_any_scale(run, tmp_path):
    imageio.imwrite(tmp_path / "start.png", np.full((30, 40, 3), (255, 0, 0), np.uint8))
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "2", "--classes", "moon", "--eta", "0"]
    command += ["--sampler", "ddim", "--start_image", str(tmp_path / "start.png")]
    for fraction in ("0.1", "1"):
        out = ["--guidance_scale", "0", "2", "--out", str(tmp_path / fraction), "--start_fraction", fraction]
        assert ex2_main.main([*command, *out]) == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["commands.txt", "guidance_grid.png", "start.png", "w=0", "w=2"]
    little, much = (imageio.imread(tmp_path / name / "w=0" / "images" / "0000_moon.png") for name in ("0.1", "1"))
    red = np.array([255, 0, 0])
    assert np.abs(little - red).mean() < 50 < np.abs(much - red).mean()


def test_calls_of_sample_do_not_mix(run):
    for folder in ("001", "002"):
        assert ex2_main.main(["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "1"]) == 0
        assert sorted(path.name for path in (run / "samples" / folder).rglob("*.png")) == [
            "0000_circle.png",
            "grid.png",
        ]


def test_broken_image_in_a_worker_is_one_line(tmp_path):
    """Also at the end of the program, when the worker is still there."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            imageio.imwrite(tmp_path / name / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b" / "7.png").write_bytes(b"half")
    flags = ["--dataset", "folder", "--data_dir", str(tmp_path), "--num_workers", "1"]
    flags += ["--results_dir", str(tmp_path.parent / f"{tmp_path.name}-results")]
    done = subprocess.run([sys.executable, str(ROOT / "ex2_main.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'b' / '7.png'} can't be read as an image")


def test_a_full_memory_is_one_line(monkeypatch, capsys):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setitem(ex2_main.COMMANDS, "train", full)
    assert "the memory is full" in rejected([], capsys, code=1)


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(ex2_main.COMMANDS, "train", full)
    assert "lower --batch_size" in rejected([], capsys, code=1)


def test_dry_run_leaves_the_real_run_alone(run):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for command in ("test", "sample"):
        assert ex2_main.main([command, "--checkpoint", str(run), "--dry_run"]) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_unconditional_model_samples_without_classes_and_refuses_them(dry, tmp_path, capsys):
    sample = ["sample", "--no_cuda", "--checkpoint", str(dry), "--n_images", "3"]
    assert ex2_main.main([*sample, "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert names == ["0000.png", "0001.png", "0002.png", "grid.png"]
    capsys.readouterr()
    assert "this model is unconditional" in rejected([*sample, "--classes", "moon"], capsys)
    assert "needs a class-conditional model" in rejected([*sample, "--guidance_scale", "2"], capsys)


def test_figures_of_a_checkpoint_can_go_elsewhere(run, tmp_path):
    before = (run / "test_metrics.json").read_bytes()
    assert ex2_main.main(["test", "--checkpoint", str(run), "--out", str(tmp_path), *EVAL_FEW]) == 0
    assert json.loads((tmp_path / "test_metrics.json").read_text())["losses"]["val"]["images"] == 5
    assert (run / "test_metrics.json").read_bytes() == before


def test_program_runs_from_anywhere_and_reports_errors_on_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "ex2_main.py"), "--epochs", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --epochs must be at least 1, got 0\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classes", "unicorn"], "unknown class 'unicorn'; the model knows circle, square"),
        (["--classes", "10"], "unknown class '10'"),
        (["--n_images", "0"], "--n_images must be at least 1"),
        (["--n_images", "100000000000"], "--n_images must be at least 1 and at most 100000"),
        (["--out", "/"], "--out: / is no folder"),
        (["--sample_steps", "31"], "--sample_steps must be at most"),
        (["--start_image", "no.png"], "--start_image: there is no file no.png"),
        (["--start_image", __file__, "--start_fraction", "0"], "--start_fraction must be above 0"),
        (["--start_image", __file__, "--start_fraction", "0.01"], "--start_fraction 0.01 is too little"),
        (["--start_image", __file__], "can't be read as an image"),
        (["--start_fraction", "0.5"], "--start_fraction says how far --start_image is noised"),
    ],
)
def test_bad_requests_for_samples(run, flags, message, capsys):
    assert message in rejected(["sample", "--no_cuda", "--checkpoint", str(run), *flags], capsys)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = rejected([*TINY, "--results_dir", str(tmp_path / "file")], capsys)
    assert "can't write to" in line and str(tmp_path / "file") in line


def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in rejected([*TINY, "--results_dir", str(tmp_path)], capsys, code=1)


def test_insisting_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in rejected(["--cuda"], capsys)


def test_dry_run_runs_one_batch_of_each_phase(dry):
    rows = list(csv.DictReader((dry / "log.csv").open()))
    assert {row["step"] for row in rows} == {"1"}
    metrics = json.loads((dry / "test_metrics.json").read_text())
    assert [metrics["losses"][part]["images"] for part in ("val", "test")] == [1, 1]


def test_the_test_set_is_used_after_training_only(tmp_path, monkeypatch):
    used = []
    real = training_run.make_loader
    monkeypatch.setattr(
        training_run, "make_loader", lambda dataset, *a, **o: used.append(len(dataset)) or real(dataset, *a, **o)
    )
    without_evaluation(monkeypatch)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: used.append("evaluation"))
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path), "--dry_run"]) == 0
    assert used == [900, 100, "evaluation"]


def test_a_folder_with_images_of_an_earlier_call_is_refused_and_untouched(run, tmp_path, capsys):
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "2", "--out", str(tmp_path)]
    assert ex2_main.main(command) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert "holds images of an earlier call" in rejected([*command, "--seed", "5"], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_the_handed_out_names_are_those_of_the_program():
    assert ex2_main.train is ex2_train.train and ex2_main.test is ex2_train.test
    assert ex2_main.sample_and_save_images.__module__ == "ex2.report.pictures"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ex2_main.nothing


@pytest.mark.parametrize("command", ["--help", "train --help", "--epoch 3", "--lr x", "--schedule cosin", "report"])
def test_help_typing_errors_and_report_do_not_wait_for_torch(command, tmp_path):
    script = (
        "import sys, ex2_main\n"
        "try: ex2_main.main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *command.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "torch was imported" not in done.stderr
    assert "--batch_size" in done.stdout or "usage" in done.stdout or done.stderr.startswith("error: "), done.stderr


def test_commands_are_noted_before_their_work_and_only_if_accepted(run, tmp_path, monkeypatch, capsys):
    def cut(*args, **options):
        raise KeyboardInterrupt

    without_evaluation(monkeypatch)
    monkeypatch.setattr(training_run, "train", cut)
    command = [*TINY, "--results_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        ex2_main.main(command)
    noted = files.read_commands(tmp_path / "DDPM")
    assert len(noted) == 1 and noted[0].startswith("python ex2_main.py --dataset shapes")
    rejected([*command, "--epochs", "2"], capsys)  # other settings than the run's
    assert files.read_commands(tmp_path / "DDPM") == noted
    sample = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "1", "--out", str(tmp_path / "images")]
    assert ex2_main.main(sample) == 0
    assert files.read_commands(tmp_path / "images") == [shlex.join(["python", "ex2_main.py", *sample])]


def test_a_test_with_another_folder_has_the_log_of_the_training(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "verdict", lambda config, report, log: seen.append(len(log)) or [])
    assert ex2_main.main(["test", "--checkpoint", str(run), "--out", str(tmp_path), *EVAL_FEW]) == 0
    assert seen == [len(RunLog.read(run / "log.csv"))] and seen[0] > 0
