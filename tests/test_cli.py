"""The program as a user calls it: every command, bad input, exit codes, files, pictures."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tiny import TINY

import ex2_checkpoint as ckpt
import ex2_config as cfg
import ex2_data
import ex2_fit
import ex2_main
import ex2_pictures
from ex2_cli import PRESETS, parse_args
from ex2_diffusion import Diffusion, ImageNoise

ROOT = Path(__file__).parent.parent

EVAL_FEW = ["--eval_images", "5", "--eval_samples", "0", "--no_cuda"]
pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional run."""
    results = tmp_path_factory.mktemp("results")
    assert ex2_main.main([*TINY, "--results_dir", str(results), "--class_free_guidance", "--run_name", "cond"]) == 0
    return results / "cond"


def rejected(argv, capsys, code=2):
    """The one line that `argv` is refused with."""
    assert ex2_main.main(argv) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


# ------------------------------------------------------------------ commands


def test_train_writes_every_file_of_the_run(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        *(
            "commands.txt",
            "config.json",
            "log.csv",
            "ckpt.pt",
            "test_metrics.json",
            "training.png",
            "loss_over_t.png",
            "schedules.png",
        ),
        *("forward_strip.png", "forward.gif", "reverse_strip.png", "reverse.gif", "x_zero_strip.png"),
        *(
            "class_grid.png",
            "guidance_grid.png",
            "guidance.gif",
            "bits_per_dim.png",
            "time_embedding.png",
            "schedules.png",
        ),
        ".lock",
    }
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert int(rows[-1]["step"]) == 9 and float(rows[-1]["val_loss"]) > 0
    report = json.loads((run / "test_metrics.json").read_text())
    assert report["losses"]["test"]["t"] == [0, 14, 29] and report["losses"]["val"]["images"] == 20
    assert report["weights"] == "ema" and 0 <= report["class_accuracy"]["accuracy"] <= 1
    assert json.loads((run / "config.json").read_text())["flip"] is False


def test_unconditional_run_has_a_grid_without_class_names(tmp_path, capsys):
    few = [*TINY, "--timesteps", "10", "--results_dir", str(tmp_path), "--dry_run"]
    assert ex2_main.main(few) == 0  # at T = 10 linear and sigmoid schedules don't exist, and are left out of the plot
    names = {path.name for path in (tmp_path / "DDPM-dry_run").iterdir()}
    assert "samples.png" in names and "class_grid.png" not in names
    assert "class_accuracy" not in json.loads((tmp_path / "DDPM-dry_run" / "test_metrics.json").read_text())


def test_start_says_steps_and_time(tmp_path, capsys):
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "images"]
    assert imageio.imread(tmp_path / "images" / names[0]).shape == (8, 8, 3)
    again = tmp_path.with_name("again")
    assert ex2_main.main([*command, "--out", str(again), "--sample_batch", "5"]) == 0
    first, second = (imageio.imread(folder / "images" / names[1]).astype(int) for folder in (tmp_path, again))
    assert np.abs(first - second).max() <= 1


def test_several_guidance_scales_start_from_the_same_noise(run, tmp_path):
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "3", "--classes", "moon", "star"]
    assert ex2_main.main([*command, "--out", str(tmp_path / "all"), "--guidance_scale", "-1", "0", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["guidance_grid.png", "w=-1", "w=0", "w=2"]
    assert ex2_main.main([*command, "--out", str(tmp_path / "one"), "--guidance_scale", "2"]) == 0
    for name in ("0000_moon.png", "0001_star.png", "0002_moon.png"):
        alone, together = (imageio.imread(tmp_path / folder / "images" / name) for folder in ("one", "all/w=2"))
        assert np.array_equal(alone, together)
        assert not np.array_equal(alone, imageio.imread(tmp_path / "all" / "w=0" / "images" / name))
    # Without a class, two images of different classes from the same noise would be one.
    free = imageio.imread(tmp_path / "all" / "w=-1" / "images" / "0000_moon.png")
    assert ex2_main.main([*command[:-2], "ring", "--out", str(tmp_path / "ring"), "--guidance_scale", "-1"]) == 0
    assert np.array_equal(free, imageio.imread(tmp_path / "ring" / "images" / "0000_ring.png"))


def test_calls_of_sample_do_not_mix(run):
    for folder in ("001", "002"):
        assert ex2_main.main(["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "1"]) == 0
        assert sorted(path.name for path in (run / "samples" / folder).rglob("*.png")) == [
            "0000_circle.png",
            "grid.png",
        ]


def test_class_names_come_before_class_numbers():
    config = cfg.Config(class_free_guidance=True)
    assert ex2_main.choose_classes(["1", "2", "0"], ["2", "1", "x"], config) == [1, 0, 0]


def test_broken_image_in_a_worker_is_one_line(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            imageio.imwrite(tmp_path / name / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b" / "7.png").write_bytes(b"half")
    flags = ["--dataset", "folder", "--data_dir", str(tmp_path), "--num_workers", "1"]
    flags += ["--results_dir", str(tmp_path.parent / f"{tmp_path.name}-results")]
    line = rejected(flags, capsys)
    assert line.startswith(f"error: {tmp_path / 'b' / '7.png'} can't be read as an image")


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


def test_unconditional_model_samples_without_classes_and_refuses_them(tmp_path, capsys):
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path), "--dry_run"]) == 0
    sample = ["sample", "--no_cuda", "--checkpoint", str(tmp_path / "DDPM-dry_run"), "--n_images", "3"]
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


def test_sample_and_save_images_with_the_skeletons_arguments(run, tmp_path):
    saved = ckpt.load_checkpoint(run)
    config = cfg.config_of(saved, {})
    model, diffusor = cfg.restore_model(saved, config, "cpu").train(), cfg.build_diffusion(config, "cpu")
    images = ex2_main.sample_and_save_images(2, diffusor, model, "cpu", tmp_path / "out")
    assert images.shape == (2, 3, 8, 8) and model.training
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["0000.png", "0001.png", "grid.png"]
    png = torch.from_numpy(imageio.imread(tmp_path / "out" / "images" / "0000.png")).permute(2, 0, 1)
    assert torch.equal(png, ex2_data.reverse_transform(images[0]))


def test_grids_show_the_first_images_of_many(run, tmp_path, monkeypatch):
    """All of 10,000 would take 9 GB."""
    for module in (ex2_main, ex2_pictures):
        monkeypatch.setattr(module, "GRID_IMAGES", 2)
    command = ["sample", "--checkpoint", str(run), "--guidance_scale", "0", "1", "--sample_steps", "1", "--no_cuda"]
    for count in ("2", "5"):
        assert ex2_main.main([*command, "--n_images", count, "--out", str(tmp_path / count)]) == 0
    assert len(list((tmp_path / "5" / "w=0" / "images").glob("0*.png"))) == 5
    for name in ("w=0/grid.png", "guidance_grid.png"):
        two, five = (imageio.imread(tmp_path / count / name) for count in ("2", "5"))
        np.testing.assert_array_equal(two, five)


def test_class_names_become_file_names(run, tmp_path):
    saved = ckpt.load_checkpoint(run)
    config = cfg.config_of(saved, {})
    model, diffusor = cfg.restore_model(saved, config, "cpu"), cfg.build_diffusion(config, "cpu")
    names = ["../a b/c", *saved["class_names"][1:]]
    ex2_main.sample_and_save_images(1, diffusor, model, "cpu", tmp_path, classes=[0], class_names=names, steps=2)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["0000_.._a_b_c.png", "grid.png"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_a_model_and_a_process(name):
    config = PRESETS[name]
    assert config.run_name == name
    with torch.device("meta"):
        assert sum(p.numel() for p in cfg.build_model(config, 10).parameters()) > 10**6
    assert cfg.build_diffusion(config, "cpu").timesteps == 1000


def test_program_runs_from_anywhere_and_reports_errors_on_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "ex2_main.py"), "--epochs", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --epochs must be at least 1, got 0\n"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--batch_size -4", "--batch_size must be at least 1"),
        ("--epochs many", "invalid int value"),
        ("--lr 0", "--lr must be above 0"),
        ("--lr nan", "--lr must be finite"),
        ("--p_uncond 1.2", "--p_uncond must be at most 1"),
        ("--eta -1", "--eta must be at least 0"),
        ("--eta 0.5", "--eta must lie within 0 .. 1, above 0 only for ddim and dpmpp_2m"),
        ("--class_free_guidance --p_uncond 0 --guidance_scale 1", "learnt without labels"),
        ("--seed 18446744073709551616", "--seed must be at most"),
        ("--p_uncond 0.2", "--p_uncond is for class-conditional models"),
        ("--guidance_scale 2", "--guidance_scale needs a class-conditional model"),
        ("--timesteps 0", "--timesteps must be at least 1"),
        ("--timesteps 10", "10 timesteps are too few"),
        ("--timesteps 50 --sample_steps 51", "--sample_steps must be at most --timesteps"),
        ("--schedule quadratic", "linear, cosine, sigmoid; got 'quadratic'"),
        ("--dataset mnist", "cifar10, shapes, folder, butterflies; got 'mnist'"),
        ("--sampler euler", "ddpm, ddim, dpmpp_2m, heun; got 'euler'"),
        ("--loss_type l3", "l1, l2; got 'l3'"),
        ("--dim 10", "10 channels into 4 groups"),
        ("--dim_mults 1 0", "--dim_mults must be at least 1"),
        ("--image_size 30", "can't be halved 2 times"),
        ("--image_size 256", "64x64 positions"),
        ("--run_name a/b", "--run_name must be a plain folder name"),
        ("--seed -1", "--seed must be at least 0"),
        ("--no_such_flag", "unrecognized arguments"),
        ("--preset huge", "invalid choice"),
        ("--dataset folder", "needs --data_dir"),
        ("--dataset folder --data_dir nowhere", "nowhere is no folder"),
        ("--data_dir somewhere", "--data_dir: the shapes are drawn"),
        ("--class_free_guidance --guidance_scale 1e39", "--guidance_scale must be at most 1000"),
        ("--batch_size 100000000000000000000", "--batch_size must be at most"),
        ("test --checkpoint x --seed 5", "--seed is fixed by the checkpoint and can't be given to test"),
        ("test", "--checkpoint"),
        ("test --checkpoint nowhere", "no checkpoint at nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [] if flags.startswith("test") or "dataset" in flags else ["--dataset", "shapes"]
    assert message in rejected([*flags.split(), *quick], capsys)
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classes", "unicorn"], "unknown class 'unicorn'; the model knows circle, square"),
        (["--classes", "10"], "unknown class '10'"),
        (["--n_images", "0"], "--n_images must be at least 1"),
        (["--n_images", "100000000000"], "--n_images must be at least 1 and at most 100000"),
        (["--out", "/"], "--out: / is no folder"),
        (["--sample_steps", "31"], "--sample_steps must be at most"),
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

    monkeypatch.setattr(ckpt.os, "fsync", full)
    assert "No space left on device" in rejected([*TINY, "--results_dir", str(tmp_path)], capsys, code=1)


def test_insisting_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in rejected(["--cuda"], capsys)


def test_booleans_have_an_on_and_an_off_form():
    for f in cfg.fields(cfg.Config):
        if "type" not in f.metadata:
            assert parse_args([f"--{f.name}"]).given == {f.name: True}
            assert parse_args([f"--no_{f.name}"]).given == {f.name: False}


def test_flags_of_the_skeleton_stay():
    args = parse_args(
        "--batch_size 8 --timesteps 100 --epochs 2 --lr 0.003 --no_cuda".split()
        + "--log_interval 5 --save_model --run_name x --dry_run".split()
    )
    assert args.command == "train"
    assert args.given == {
        **{"batch_size": 8, "timesteps": 100, "epochs": 2, "lr": 0.003, "cuda": False, "log_interval": 5},
        **{"save_model": True, "run_name": "x", "dry_run": True},
    }


def test_flags_beside_a_preset_count(tmp_path):
    args = parse_args(["--preset", "quick", "--epochs", "7"])
    assert cfg.dataclasses.replace(PRESETS[args.preset], **args.given).epochs == 7


def test_help_of_train_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        ex2_main.main(["train", "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in cfg.fields(cfg.Config):
        assert f"--{f.name} " in text and f.metadata["help"] in text


@pytest.mark.parametrize("command", [[], ["test"], ["sample"]])
def test_help_of_the_others(command, capsys):
    with pytest.raises(SystemExit) as done:
        ex2_main.main([*command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert ("--checkpoint" if command else "train --help") in text


# ------------------------------------------------------------------ what the pictures hold


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to ex2_viz, by file name."""
    calls = {}
    monkeypatch.setattr(
        ex2_main.viz, "save_grid", lambda images, path, *rest, **o: calls.update({path.name: (images, *rest)})
    )
    monkeypatch.setattr(ex2_main.viz, "save_strip", lambda steps, path, title: calls.update({path.name: steps}))
    monkeypatch.setattr(ex2_main.viz, "save_process_gif", lambda steps, path: calls.update({path.name: steps}))
    monkeypatch.setattr(ex2_main.viz, "plot_schedules", lambda betas, path: calls.update({path.name: betas}))
    return calls


@pytest.fixture
def restored(run):
    saved = ckpt.load_checkpoint(run)
    config = cfg.config_of(saved, {"sample_steps": 23})
    return config, cfg.restore_model(saved, config, "cpu"), cfg.build_diffusion(config, "cpu")


def test_class_grids_show_all_classes_with_their_names(restored, drawn):
    config, model, diffusor = restored
    ex2_main.draw_samples(model, ex2_data.SHAPES, diffusor, config)
    images, columns, names = drawn["class_grid.png"]
    assert (len(images), columns, names) == (80, 8, ex2_data.SHAPES)
    images, columns, names, scales = drawn["guidance_grid.png"]
    assert (len(images), columns, names) == (40, 4, ex2_data.SHAPES)
    assert scales == ["w = -1", "w = 0", "w = 1", "w = 3"]


def test_a_model_that_never_saw_the_null_class_is_not_guided(restored, drawn):
    config, model, diffusor = restored
    config = cfg.dataclasses.replace(config, p_uncond=0.0)
    assert config.sampling["guidance_scale"] == 0
    ex2_main.draw_samples(model, ex2_data.SHAPES, diffusor, config)
    assert set(drawn) == {"class_grid.png"}


def test_animations_are_one_trajectory_in_time_order_with_both_ends(restored, drawn):
    config, model, diffusor = restored
    splits = ex2_data.load_splits("shapes", None, 8, 0)
    ex2_main.draw_process(model, splits, diffusor, config)
    for name, first, last in (("forward", -1, 29), ("reverse", 29, -1)):
        times = [t for t, _ in drawn[f"{name}.gif"]]
        assert times == sorted(set(times), reverse=name == "reverse") and (times[0], times[-1]) == (first, last)
        strip = [t for t, _ in drawn[f"{name}_strip.png"]]
        assert (strip[0], strip[-1], len(strip)) == (first, last, 9) and set(strip) <= set(times)
    whole = list(
        diffusor.sample_trajectory(model, 8, 4, classes=range(4), generator=ImageNoise(0, 0, 4), **config.sampling)
    )
    for t, x in drawn["reverse.gif"]:
        match = [other for time, other, _ in whole if time == t]
        torch.testing.assert_close(x, match[0])
    assert {len(betas) for betas in drawn["schedules.png"].values()} == {30}
    assert torch.equal(drawn["schedules.png"]["cosine"].float(), diffusor.betas)


def test_dry_run_runs_one_batch_of_each_phase(tmp_path, monkeypatch):
    seen = []
    real = Diffusion.p_losses
    monkeypatch.setattr(Diffusion, "p_losses", lambda self, *a, **o: seen.append(1) or real(self, *a, **o))
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path), "--dry_run"]) == 0
    assert len(seen) == 1
    rows = list(csv.DictReader((tmp_path / "DDPM-dry_run" / "log.csv").open()))
    assert rows[-1]["step"] == "1"


def test_the_test_set_is_used_after_training_only(tmp_path, monkeypatch):
    used = []
    real = ex2_fit.make_loader
    monkeypatch.setattr(
        ex2_fit, "make_loader", lambda dataset, *a, **o: used.append(len(dataset)) or real(dataset, *a, **o)
    )
    monkeypatch.setattr(ex2_main, "evaluate", lambda *args: used.append("evaluation"))
    for name in ("write_report", "draw_process", "draw_samples"):
        monkeypatch.setattr(ex2_main, name, lambda *args: None)
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path), "--dry_run"]) == 0
    assert used == [900, 100, "evaluation"]


# ------------------------------------------------------------------ paths and numbers


PATHS = [f.name for f in cfg.dataclasses.fields(cfg.Config) if "path" in f.metadata]


def test_home_and_variables_are_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "data")
    args = parse_args(["test", "--checkpoint=~/x", "--out", "$WHERE/y", "--inception_weights", "~/${WHERE}"])
    assert (args.checkpoint, args.out, args.inception_weights) == (f"{tmp_path}/x", "data/y", f"{tmp_path}/data")
    assert parse_args(["sample", "--checkpoint", "~", "--out=~/o"]).out == f"{tmp_path}/o"
    assert parse_args(["report", "--results_dir=~"]).results_dir == str(tmp_path)
    dataset = {"data_dir": "folder", "cache_dir": "butterflies"}
    for name in PATHS:
        config = cfg.Config(**{name: "~/$WHERE", "dataset": dataset.get(name, "shapes")})
        assert getattr(config, name) == f"{tmp_path}/data"
    assert set(PATHS) == {"results_dir", "data_dir", "cache_dir"}


@pytest.mark.parametrize("path", ["~nobody_of_that_name/x", "$NO_SUCH_VARIABLE/x", "${NO_SUCH_VARIABLE}"])
@pytest.mark.parametrize("flag", ["--results_dir", "--data_dir", "--cache_dir"])
def test_a_home_or_variable_that_is_not_there_is_refused_at_once(path, flag, capsys):
    line = rejected(["--dataset", "butterflies", flag, path], capsys)
    assert f"{path}: no such home folder or environment variable" in line
    assert "no such home folder" in rejected(["sample", "--checkpoint", path], capsys)


@pytest.mark.parametrize("number", ["-5e-1", "-.5", "-0.5", "-5E-1", "-50e-2", "-5.e-1"])
def test_negative_numbers_are_numbers_on_every_python(number):
    assert parse_args(["sample", "--checkpoint", "x", "--guidance_scale", number, "1"]).scales == [-0.5, 1.0]
    assert parse_args(["test", "--checkpoint", "x", "--eval_scales", number]).eval_scales == [-0.5]
    assert parse_args(["--class_free_guidance", "--guidance_scale", number]).given["guidance_scale"] == -0.5


def test_a_folder_with_images_of_an_earlier_call_is_refused_and_untouched(run, tmp_path, capsys):
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "2", "--out", str(tmp_path)]
    assert ex2_main.main(command) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert "holds images of an earlier call" in rejected([*command, "--seed", "5"], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_single_images_lie_where_torch_fidelity_finds_them_and_nothing_else(run, tmp_path):
    utils = pytest.importorskip("torch_fidelity.utils", reason="an extra")
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "3", "--out", str(tmp_path)]
    assert ex2_main.main(command) == 0
    found = utils.glob_samples_paths(str(tmp_path / "images"), False, "png,jpg,jpeg", "jpg,jpeg", False)
    assert sorted(found) == sorted(str(path) for path in (tmp_path / "images").iterdir()) and len(found) == 3
