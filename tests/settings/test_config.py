"""Settings: every bad one is one clear line, presets build, paths are meant as in a shell."""

import dataclasses

import pytest
import torch
from tiny import rejected

from ex2.settings.build import build_diffusion, build_model
from ex2.settings.cli import PRESET_FLAGS, parse_args, preset_config
from ex2.settings.config import Config, config_of, fields

pytestmark = pytest.mark.usefixtures("small_shapes")


@pytest.mark.parametrize("name", PRESET_FLAGS)
def test_presets_build_a_model_and_a_process(name):
    config = preset_config(name)
    assert config.run_name == name
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config, 10).parameters()) > 10**6
    assert build_diffusion(config, "cpu").timesteps == 1000


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
        ("--eta 0.5", "--eta 0.5 for ddpm: only ddim and dpmpp_2m take one, up to 1; or give --eta 0"),
        ("--class_free_guidance --p_uncond 0 --guidance_scale 1", "learnt without labels"),
        ("--seed 18446744073709551616", "--seed must be at most"),
        ("--p_uncond 0.2", "--p_uncond is for class-conditional models"),
        ("--guidance_scale 2", "--guidance_scale needs a class-conditional model"),
        ("--timesteps 0", "--timesteps must be at least 1"),
        ("--timesteps 10", "10 timesteps are too few"),
        ("--timesteps 50 --sample_steps 51", "--sample_steps must be at most --timesteps"),
        ("--schedule quadratic", "linear, cosine, sigmoid; got 'quadratic'"),
        ("--dataset mnist", "cifar10, shapes, folder, butterflies; got 'mnist'"),
        ("--sampler euler", "ddpm, ddim, dpmpp_2m, heun, ipndm; got 'euler'"),
        ("--loss_type l3", "l1, l2; got 'l3'"),
        ("--dim 10", "10 channels into 4 groups"),
        ("--dim_mults 1 0", "--dim_mults must be at least 1"),
        ("--image_size 30", "can't be halved 2 times"),
        ("--image_size 256", "64x64 positions"),
        ("--run_name a/b", "--run_name must be a plain folder name"),
        ("--seed -1", "--seed must be at least 0"),
        ("--no_such_flag", "train does not know --no_such_flag (see ex2_main.py train --help)"),
        ("--epoch 3", "train does not know --epoch: did you mean --epochs?"),
        ("trian", "train does not know trian: did you mean train?"),
        ("--vary lr=1,2", "train does not know --vary"),
        ("--class_free_guidance True", "train does not know True"),
        ("--preset huge", "invalid choice"),
        ("--dataset folder", "needs --data_dir"),
        ("--dataset folder --data_dir nowhere", "nowhere is no folder"),
        ("--data_dir somewhere", "--data_dir is for --dataset cifar10 or folder or butterflies, not for shapes"),
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


PATHS = [f.name for f in fields(Config) if "path" in f.metadata]


def test_home_and_variables_are_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "data")
    args = parse_args(["test", "--checkpoint=~/x", "--out", "$WHERE/y", "--inception_weights", "~/${WHERE}"])
    assert (args.checkpoint, args.out, args.inception_weights) == (f"{tmp_path}/x", "data/y", f"{tmp_path}/data")
    assert parse_args(["sample", "--checkpoint", "~", "--out=~/o"]).out == f"{tmp_path}/o"
    assert parse_args(["report", "--results_dir=~"]).results_dir == str(tmp_path)
    dataset = {"data_dir": "folder", "cache_dir": "butterflies"}
    for name in PATHS:
        config = Config(**{name: "~/$WHERE", "dataset": dataset.get(name, "shapes")})
        assert getattr(config, name) == f"{tmp_path}/data"
    assert set(PATHS) == {"results_dir", "data_dir", "cache_dir"}


@pytest.mark.parametrize("path", ["~nobody_of_that_name/x", "$NO_SUCH_VARIABLE/x", "${NO_SUCH_VARIABLE}"])
@pytest.mark.parametrize("flag", ["--results_dir", "--data_dir", "--cache_dir"])
def test_a_home_or_variable_that_is_not_there_is_refused_at_once(path, flag, capsys):
    line = rejected(["--dataset", "butterflies", flag, path], capsys)
    assert f"{path}: no such home folder or environment variable" in line
    assert "no such home folder" in rejected(["sample", "--checkpoint", path], capsys)


def test_another_sampler_than_the_saved_one_does_not_take_its_eta():
    """`sample --sampler ipndm` was refused for an --eta that nobody had given."""
    saved = {"config": dataclasses.asdict(preset_config("quick"))}
    assert (config_of(saved, {}).sampler, config_of(saved, {}).eta) == ("dpmpp_2m", 1)
    assert config_of(saved, {"sampler": "ipndm"}).eta == 0
    assert config_of(saved, {"sampler": "ddim", "eta": 0.5}).eta == 0.5
