"""The command line: flags, presets, help."""

import pytest

import ex2_main
from ex2.settings import cli
from ex2.settings.cli import config_of_flags, parse_args, preset_config
from ex2.settings.config import Config, fields, kind_of

# ------------------------------------------------------------------ classes


def test_class_names_come_before_class_numbers():
    config = Config(class_free_guidance=True)
    assert cli.choose_classes(["1", "2", "0"], ["2", "1", "x"], config) == [1, 0, 0]


# ------------------------------------------------------------------ flags


def test_booleans_have_an_on_and_an_off_form():
    for f in fields(Config):
        if kind_of(f) is bool:
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


def test_flags_beside_a_preset_count():
    assert config_of_flags(parse_args(["--preset", "quick", "--epochs", "7"])).epochs == 7


@pytest.mark.parametrize(
    "dataset, size, flip", [("shapes", 16, False), ("cifar10", 32, True), ("butterflies", 128, True)]
)
@pytest.mark.parametrize("name", ["quick", "exercise"])
def test_what_depends_on_the_data_set_follows_the_one_in_use_in_a_preset_too(name, dataset, size, flip):
    """Moons are not mirrored, whatever the preset; in the old program `quick` on CIFAR-10 had 16 pixels."""
    config = preset_config(name, dataset=dataset, class_free_guidance=False, dim_mults=(1, 2, 2, 4))
    assert (config.image_size, config.flip) == (size, flip)


def test_abbreviated_flags_are_errors(capsys):
    """--ema 0.9999 would be taken for --ema_images 0.9999."""
    for flags in (["--ema", "0.9999"], ["sample", "--check", "x"], ["--data", "x"]):
        assert ex2_main.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_of_train_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        ex2_main.main(["train", "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert f"--{f.name} " in text and f.metadata["help"] in text


@pytest.mark.parametrize("command", [[], ["test"], ["sample"], ["export"]])
def test_help_of_the_others(command, capsys):
    with pytest.raises(SystemExit) as done:
        ex2_main.main([*command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert ("--checkpoint" if command else "train --help") in text


# ------------------------------------------------------------------ paths and numbers


@pytest.mark.parametrize("number", ["-5e-1", "-.5", "-0.5", "-5E-1", "-50e-2", "-5.e-1"])
def test_negative_numbers_are_numbers_on_every_python(number):
    assert parse_args(["sample", "--checkpoint", "x", "--guidance_scale", number, "1"]).scales == [-0.5, 1.0]
    assert parse_args(["test", "--checkpoint", "x", "--eval_scales", number]).eval_scales == [-0.5]
    assert parse_args(["--class_free_guidance", "--guidance_scale", number]).given["guidance_scale"] == -0.5
