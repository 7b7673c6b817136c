"""A training run: resuming, averages, budget, what is never saved (2.1)."""

import functools
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tiny import fit, random_set, tiny_config, tiny_splits, train_epoch

from ex2.data.loader import make_loader
from ex2.errors import InputError, RunError
from ex2.settings import config as settings_config
from ex2.settings.build import build_diffusion, build_model, restore_model
from ex2.settings.config import TRAINING_GROUPS, Config
from ex2.training import checkpoint, run
from ex2.training.log import RunLog
from ex2.training.run import Training

CPU = torch.device("cpu")


def test_weights_that_are_not_finite_are_never_saved(tmp_path, diffusor, monkeypatch):
    config, real = tiny_config(tmp_path), run.test

    def spoil(model, *args):
        torch.nn.init.constant_(model.final_conv.bias, float("inf"))
        return real(model, *args)

    monkeypatch.setattr(run, "test", spoil)
    with pytest.raises(RunError, match="not finite after epoch 1"):
        fit(config, tiny_splits(), diffusor)
    assert checkpoint.load_checkpoint(config.run_dir)["step"] == 0  # as written at the start


def test_diverged_run_keeps_the_last_good_checkpoint(tmp_path, diffusor, monkeypatch):
    config, real = tiny_config(tmp_path), run.train

    def fail_in_second_epoch(model, loader, optimizer, diffusor, epoch, *args, **hooks):
        if epoch == 1:
            torch.nn.init.constant_(model.final_conv.bias, float("nan"))
        return real(model, loader, optimizer, diffusor, epoch, *args, **hooks)

    monkeypatch.setattr(run, "train", fail_in_second_epoch)
    with pytest.raises(RunError, match="epoch 2"):
        fit(config, tiny_splits(), diffusor)
    saved = checkpoint.load_checkpoint(config.run_dir)
    assert saved["epoch"] == 1
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_test_and_samples_use_the_average(tmp_path, diffusor):
    config = tiny_config(tmp_path)
    averaged = fit(config, tiny_splits(), diffusor)
    saved = checkpoint.load_checkpoint(config.run_dir)
    restored = restore_model(saved, config, CPU)
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert any(not torch.equal(saved["ema"][k], saved["model"][k]) for k in saved["model"])
    assert not averaged.training


def test_a_run_whose_time_is_up_ends_annealed_and_is_not_gone_on_with(tmp_path, diffusor, monkeypatch, capsys):
    """A step of a slow clock takes a second, validation and saving nothing."""
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    real = Training.take_step

    def slow_step(self, *batch):
        clock[0] += 1.0
        return real(self, *batch)

    monkeypatch.setattr(Training, "take_step", slow_step)
    config = tiny_config(tmp_path, epochs=9, max_minutes=5 / 60, log_interval=1, warmup_steps=0)
    fit(config, tiny_splits(), diffusor)
    saved = checkpoint.load_checkpoint(config.run_dir)
    assert (saved["step"], saved["epoch"], saved["seconds"]) == (5, 1, 5.0)  # epochs of 3 steps: in the middle of one
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.5e-3 * (1 + math.cos(0.8 * math.pi)))
    rows = RunLog.read(config.run_dir / "log.csv")
    rates = [float(row["lr"]) for row in rows if row["lr"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == 5
    assert [(row["step"], row["epoch"]) for row in rows if row["val_loss"]] == [("3", "0"), ("5", "1")]

    fit(config, tiny_splits(), diffusor)
    assert checkpoint.load_checkpoint(config.run_dir)["step"] == 5
    assert RunLog.read(config.run_dir / "log.csv") == rows


def test_compiled_training_is_training_and_its_checkpoint_has_no_prefix(tmp_path, diffusor, monkeypatch):
    """By a backend that needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    saved = {}
    for name in ("eager", "compiled"):
        small = {"epochs": 1, "dim_mults": (1,), "p_uncond": 0.0, "amp": "off"}
        config = tiny_config(tmp_path, run_name=name, compile="on" if name == "compiled" else "auto", **small)
        fit(config, tiny_splits(), diffusor)
        saved[name] = checkpoint.load_checkpoint(config.run_dir)
    assert saved["eager"]["model"].keys() == saved["compiled"]["model"].keys()
    for name, weight in saved["eager"]["model"].items():
        torch.testing.assert_close(saved["compiled"]["model"][name], weight, rtol=0, atol=1e-4)


def test_a_way_to_optimise_is_this_machines_and_not_that_of_the_one_which_saved(tmp_path, diffusor):
    config = tiny_config(tmp_path, epochs=1)
    fit(config, tiny_splits(), diffusor)
    saved = checkpoint.load_checkpoint(config.run_dir)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = "of another machine"
    loader = make_loader(random_set(40), 16, CPU)
    state = Training(build_model(config, 3), config, diffusor, loader, "abc")
    state.load_weights(saved)
    assert state.optimizer.param_groups[0]["fused"] == state.optimizer.defaults["fused"] != "of another machine"


def test_checkpoint_is_plain_and_without_foreign_prefixes(tmp_path, diffusor):
    config = tiny_config(tmp_path, epochs=1)
    fit(config, tiny_splits(), diffusor)
    saved = torch.load(config.run_dir / "ckpt.pt", weights_only=True)
    assert Config(**saved["config"]) == config
    assert saved["class_names"] == ["a", "b", "c"] and saved["epoch"] == 1 and saved["step"] == 3
    assert not [k for part in ("model", "ema") for k in saved[part] if "module." in k or "_orig_mod" in k]
    assert not list(config.run_dir.glob("*.tmp"))


def test_every_epoch_has_its_own_order(tmp_path, diffusor, monkeypatch):
    orders, real = [], run.train

    def remember(model, loader, *args, **hooks):
        orders.append(torch.cat([images.flatten(1)[:, 0] for images, _ in loader]).tolist())
        return real(model, loader, *args, **hooks)

    monkeypatch.setattr(run, "train", remember)
    fit(tiny_config(tmp_path, epochs=3, flip=False), tiny_splits(), diffusor)
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_resuming_with_other_settings_names_them(tmp_path, diffusor):
    fit(tiny_config(tmp_path, epochs=1), tiny_splits(), diffusor)
    with pytest.raises(InputError, match=r"--batch_size 16 there, 20 now.*--run_name"):
        fit(tiny_config(tmp_path, epochs=1, batch_size=20), tiny_splits(), diffusor)


def test_resuming_on_other_classes_names_them(tmp_path, diffusor):
    config, splits = tiny_config(tmp_path, epochs=1), tiny_splits()
    fit(config, splits, diffusor)
    splits.class_names = ("a", "b", "z")
    for allow in (False, True):  # their labels mean something else, whatever is allowed
        config = tiny_config(tmp_path, epochs=1, allow_changes=allow)
        with pytest.raises(InputError, match=r"other classes \(a, b, c there, a, b, z now\)"):
            fit(config, splits, diffusor)


def test_a_run_goes_on_where_its_data_has_moved(tmp_path, diffusor):
    here = tiny_config(tmp_path, epochs=1, dataset="folder", data_dir="/here")
    fit(here, tiny_splits(), diffusor)
    moved = tiny_config(tmp_path, epochs=1, dataset="folder", data_dir="/elsewhere", num_workers=3)
    fit(moved, tiny_splits(), diffusor)


def test_finished_run_is_not_trained_again(tmp_path, diffusor, capsys):
    config = tiny_config(tmp_path, epochs=1)
    first = fit(config, tiny_splits(), diffusor)
    before = (config.run_dir / "ckpt.pt").read_bytes()
    again = fit(config, tiny_splits(), diffusor)
    assert "3 of 3 steps (1 of 1 epochs) are done" in capsys.readouterr().out
    assert (config.run_dir / "ckpt.pt").read_bytes() == before
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_the_estimate_comes_from_the_first_steps(tmp_path, diffusor, monkeypatch, capsys):
    clock, real = [0.0], Training.take_step

    def slow_step(self, *batch):
        clock[0] += 30.0
        return real(self, *batch)

    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Training, "take_step", slow_step)
    fit(tiny_config(tmp_path, epochs=4), tiny_splits(), diffusor)
    said = capsys.readouterr().out
    assert "12 optimiser steps of 16 images" in said
    assert said.count("6 steps of 16 images are left: about 3.0 min at 30.000 s each\n") == 1


def test_where_nothing_can_be_compiled_auto_goes_on_without(tmp_path, model, diffusor, monkeypatch, capsys):
    """In the step at which it shows, which is taken again: the weights end as if it had not been tried."""

    def cannot(*inputs):
        raise torch._dynamo.exc.TorchDynamoException("no Triton\nand a long story")

    ends = []
    for tries in (False, True):
        config = tiny_config(tmp_path)
        loader = make_loader(random_set(40), 16, CPU, train=True)
        training = Training(deepcopy(model), config, diffusor, loader, "abc")
        training.start()
        if tries:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "compile", lambda function, **options: cannot)
                training.build_step_function(compiled=True)
        train_epoch(training)
        ends.append(torch.cat([p.flatten() for p in training.ema.model.parameters()]))
    assert torch.equal(*ends)
    assert capsys.readouterr().out.count("can't compile the network here (no Triton): going on without\n") == 1


CHANGES = {
    "timesteps": 40, "schedule": "cosine", "p_uncond": 0.5, "dropout": 0.3, "epochs": 7, "batch_size": 10, "lr": 1e-4,
    "adam_beta1": 0.5, "warmup_steps": 3, "loss_type": "l1", "grad_clip": 0.01, "ema_images": 1.0, "min_snr": 2.0,
    "max_minutes": 3.0, "amp": "off", "seed": 9, "flip": True,
}  # fmt: skip
NEW_MODEL = ("dim", "dim_mults", "class_free_guidance", "null_token")  # weights that don't fit are refused
NEW_DATA = ("dataset", "data_seed", "image_size", "square", "label_column")  # read before: tests give the images


def first_step(training):
    """What the next step computes, and the state after it."""
    training.build_step_function(compiled=False)
    training.network.train()
    training.loader.set_epoch(training.epochs_done)
    loss, norm = training.take_step(*next(iter(training.loader)))
    weights = [p.detach().clone() for p in (*training.model.parameters(), *training.ema.weights)]
    return [loss, norm, torch.tensor(training.lr, dtype=torch.float64), *weights]


def test_every_setting_is_in_the_loop_below():
    fields = [f for f in settings_config.dataclasses.fields(Config) if f.metadata["group"] in TRAINING_GROUPS]
    assert {f.name for f in fields} | {"seed"} == {*CHANGES, *NEW_MODEL, *NEW_DATA}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The settings and the checkpoint of a run that was cut off after its first epoch, and its next step."""
    config = tiny_config(tmp_path_factory.mktemp("short"), amp="on", log_interval=1)
    training = built(config)
    training.start()
    train_epoch(training)
    training.save()
    saved = checkpoint.load_checkpoint(config.run_dir)
    assert saved["step"] == 3
    return config, saved, step_from(config, saved)


def built(config):
    torch.manual_seed(config.seed)
    model = build_model(config, 3)
    loader = make_loader(random_set(40), config.batch_size, CPU, train=True, flip=config.flip, seed=config.seed)
    return Training(model, config, build_diffusion(config, CPU), loader, "abc")


def step_from(config, saved):
    """The next step of a new run that is given the weights and moments of a checkpoint."""
    new = built(settings_config.dataclasses.replace(config, results_dir=f"{config.results_dir}/new", save_model=False))
    new.load_weights(deepcopy(saved))  # whose moments its step would change
    new.seconds = saved["seconds"]
    return first_step(new)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_holds_from_the_first_step_of_a_resumed_run(short_run, name):
    """The same as of a new run with that setting, which is given weights and moments."""
    before, saved, unchanged = short_run
    config = settings_config.dataclasses.replace(before, allow_changes=True, **{name: CHANGES[name]})
    resumed = built(config)
    resumed.resume()
    step = first_step(resumed)
    assert all(torch.equal(x, y) for x, y in zip(step, step_from(config, saved)))
    later = ("epochs", "max_minutes", "warmup_steps")  # which show in the learning rate of later steps alone
    assert name in later or not all(torch.equal(x, y) for x, y in zip(step, unchanged))


@pytest.mark.parametrize("slowest, compiled", [(12.0, True), (5.0, False)])
def test_processes_compile_together_by_the_clock_of_the_slowest(tmp_path, diffusor, monkeypatch, slowest, compiled):
    """This one would not by its own 9 minutes, or would by 11; each decided by its own clock."""
    loader = make_loader(random_set(40), 16, CPU)
    training = Training(build_model(tiny_config(tmp_path), 3), tiny_config(tmp_path), diffusor, loader, "abc")
    training.device, built = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(run, "all_reduce_max", lambda number, minutes: (number, slowest))
    monkeypatch.setattr(training, "build_step_function", lambda compiled: built.append(compiled))
    training.maybe_compile(9.0 if compiled else 11.0)
    assert built == [True] * compiled
