"""Train and test loop, averaged weights, checkpoints and resuming (2.1, 2.2 e)."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch

import ex2_checkpoint as ckpt
import ex2_config as cfg
import ex2_main
import ex2_training
from ex2_data import ImageSet, InputError
from ex2_diffusion import SCHEDULES, Diffusion, evenly_spaced
from ex2_loader import make_loader
from ex2_metrics import loss_over_timesteps
from ex2_model import Unet, WeightStandardizedConv2d
from ex2_training import LossMeter, RunError, RunLog, build_ema, build_scheduler

CPU = torch.device("cpu")
SKELETON_ARGS = SimpleNamespace(log_interval=100, dry_run=False, batch_size=8, timesteps=50)


@pytest.fixture
def diffusor():
    return Diffusion(50, SCHEDULES["cosine"], 8, "cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Unet(dim=8, dim_mults=(1, 2), class_free_guidance=True, num_classes=3)


def random_set(count, size=8):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=g)
    return ImageSet(images, torch.arange(count) % 3)


def tiny_config(tmp_path, **changes):
    settings = {
        "dataset": "shapes",
        "image_size": 8,
        "dim": 8,
        "dim_mults": (1, 2),
        "timesteps": 50,
        "batch_size": 16,
        "epochs": 2,
        "results_dir": str(tmp_path),
        "eval_images": 8,
        "eval_timesteps": 2,
        "class_free_guidance": True,
    }
    config = cfg.Config(**{**settings, **changes})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def tiny_splits():
    sets = [random_set(40), random_set(8), random_set(8)]
    return SimpleNamespace(train=sets[0], val=sets[1], test=sets[2], class_names=("a", "b", "c"))


# ------------------------------------------------------------------ train


class Recorder(torch.nn.Module):
    """Predicts zeros and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.x, self.t = [], []

    def forward(self, x, t):
        self.x.append(x.detach())
        self.t.append(t)
        return x * self.scale


def run_epoch(model, diffusor, dataset=None, batch_size=8, args=SKELETON_ARGS, lr=1e-3, device=CPU, **options):
    loader = make_loader(dataset or random_set(20), batch_size, CPU, train=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return ex2_main.train(model, loader, optimizer, diffusor, 0, device, args, **options)


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_train_with_the_skeletons_arguments_lowers_the_loss(model, diffusor, device):
    dataset = random_set(64)
    losses = [run_epoch(model, diffusor, dataset, lr=3e-3, device=device) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_training_draws_all_times_for_every_sample(diffusor):
    torch.manual_seed(0)
    recorder = Recorder()
    run_epoch(recorder, diffusor, random_set(2000, size=2), batch_size=100)
    times = torch.cat(recorder.t)
    assert set(times.tolist()) == set(range(50))
    assert all(len(t.unique()) > 1 for t in recorder.t)


def test_epoch_loss_is_the_mean_over_images_with_a_smaller_last_batch():
    meter = LossMeter(0)
    for loss, count in ((1.0, 8), (2.0, 8), (7.0, 4)):
        meter.add(torch.tensor(loss), torch.tensor(1.0), count, 1e-3)
        meter.close_window()
    assert meter.mean == pytest.approx((8 + 16 + 28) / 20)


def test_window_loss_does_not_depend_on_the_log_interval():
    losses = [(torch.tensor(float(i)), torch.tensor(0.0), 3 + i, 1e-3) for i in range(6)]
    means = []
    for interval in (1, 2, 6):
        meter = LossMeter(0)
        for i, step in enumerate(losses):
            meter.add(*step)
            if (i + 1) % interval == 0:
                meter.close_window()
        means.append(meter.mean)
    assert means == pytest.approx([means[0]] * 3)


def test_without_a_terminal_progress_comes_in_lines(diffusor, capsys):
    args = SimpleNamespace(log_interval=2, dry_run=False)
    run_epoch(Recorder(), diffusor, random_set(20), batch_size=4, args=args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch 1, step {i}/5" for i in (2, 4, 5)]


def test_dry_run_takes_one_batch_and_reports_its_mean(diffusor):
    torch.manual_seed(0)
    recorder = Recorder()
    args = SimpleNamespace(log_interval=100, dry_run=True)
    loss = run_epoch(recorder, diffusor, random_set(500, size=16), batch_size=50, args=args)
    assert len(recorder.x) == 1
    assert loss == pytest.approx(1, abs=0.02)


def test_train_hands_the_model_images_in_range_and_sets_train_mode(model, diffusor):
    model.eval()
    run_epoch(model, diffusor)
    assert model.training
    raw = [(torch.full((4, 3, 8, 8), 128.0), torch.zeros(4, dtype=torch.long))]
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"\|x\| up to 128"):
        ex2_main.train(model, raw, optimizer, diffusor, 0, CPU, SKELETON_ARGS)


def test_gradients_are_clipped_and_the_norm_before_is_reported(diffusor):
    model = Recorder()
    model.scale.data.fill_(1000.0)
    rows = []
    log = SimpleNamespace(write=lambda **row: rows.append(row))
    run_epoch(model, diffusor, log=log, grad_clip=0.5)
    assert rows[-1]["grad_norm"] > 100
    assert model.scale.grad.abs().item() == pytest.approx(0.5, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(diffusor):
    class Diverging(Recorder):
        def forward(self, x, t):
            super().forward(x, t)
            return x * self.scale * (float("nan") if len(self.x) == 3 else 1.0)

    with pytest.raises(RunError, match=r"step 3 of epoch 1 \(learning rate 0.001\): lower --lr"):
        run_epoch(Diverging(), diffusor)


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    meter = LossMeter(2)
    for i, norm in enumerate((1.0, float("inf"), 1.0)):
        meter.add(torch.tensor(0.5), torch.tensor(norm), 4, 0.1 * (i + 1))
    with pytest.raises(RunError, match=r"step 2 of epoch 3 \(learning rate 0.2\)"):
        meter.close_window()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, diffusor, monkeypatch):
    config = tiny_config(tmp_path)
    real_train = ex2_main.train

    def spoil(model, *rest, ema=None, **options):
        loss = real_train(model, *rest, ema=ema, **options)
        torch.nn.init.constant_(ema.module.final_conv.bias, float("inf"))
        return loss

    monkeypatch.setattr(ex2_main, "announce", lambda *args: None)
    monkeypatch.setattr(ex2_main, "train", spoil)
    with pytest.raises(RunError, match="not finite after epoch 1"):
        ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    assert ckpt.load_checkpoint(config.run_dir)["step"] == 0  # as written at the start


def test_diverged_run_keeps_the_last_good_checkpoint(tmp_path, diffusor, monkeypatch):
    config = tiny_config(tmp_path)
    real_train = ex2_main.train

    def fail_in_second_epoch(model, loader, optimizer, diffusor, epoch, *rest, **options):
        if epoch == 1:
            torch.nn.init.constant_(model.final_conv.bias, float("nan"))
        return real_train(model, loader, optimizer, diffusor, epoch, *rest, **options)

    monkeypatch.setattr(ex2_main, "train", fail_in_second_epoch)
    with pytest.raises(RunError, match="epoch 2"):
        ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    saved = ckpt.load_checkpoint(config.run_dir)
    assert saved["epoch"] == 1
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_bfloat16_training_stays_near_float32(diffusor):
    losses = []
    for amp in (False, True):
        torch.manual_seed(0)
        model = Unet(dim=8, dim_mults=(1, 2))
        torch.manual_seed(1)
        losses.append(run_epoch(model, diffusor, random_set(64), amp=amp))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] != losses[1]


# ------------------------------------------------------------------ schedule and averages


def test_warm_up_counts_optimiser_steps_and_decay_ends_at_zero():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = build_scheduler(optimizer, warmup_steps=10, total_steps=200)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == rates[10] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_warm_up_takes_at_most_a_tenth_of_a_short_run():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = build_scheduler(optimizer, warmup_steps=500, total_steps=20)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_average_follows_the_ramp_and_differs_from_the_weights():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = build_ema(layer, ema_images=100, batch_size=8)
    expected = 1.0
    for n in range(1, 200):
        layer.weight.data.fill_(float(n % 7))
        ema.update_parameters(layer)
        decay = 0.5 ** (8 / min(100, 0.1 * 8 * n))  # half in 100 images, or in a tenth of the 8 n seen
        expected = decay * expected + (1 - decay) * (n % 7)
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if n == 1:
            assert ema.module.weight.item() != layer.weight.item() or n % 7 == 1


def test_short_runs_forget_the_initial_weights_even_with_a_long_average():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = build_ema(layer, ema_images=1e6, batch_size=128)
    layer.weight.data.fill_(0.0)
    for _ in range(750):
        ema.update_parameters(layer)
    assert ema.module.weight.item() < 1e-6  # with a constant half-life of a million images it would be 0.94


def test_test_and_samples_use_the_average(tmp_path, diffusor):
    config = tiny_config(tmp_path)
    averaged = ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    saved = ckpt.load_checkpoint(config.run_dir)
    restored = cfg.restore_model(saved, config, CPU)
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert any(not torch.equal(saved["ema"][k], saved["model"][k]) for k in saved["model"])
    assert not averaged.training


# ------------------------------------------------------------------ speed and budget


def test_learning_rate_is_zero_when_the_time_is_up():
    spent = [0.0]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = build_scheduler(optimizer, warmup_steps=0, total_steps=1000, time_spent=lambda: spent[0])
    rates = []
    for spent[0] in (0.0, 0.25, 0.5, 1.0, 1.5):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0.001, 0.25, 0.5, 1, 1)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_a_run_whose_time_is_up_ends_annealed_and_is_not_gone_on_with(tmp_path, diffusor, monkeypatch, capsys):
    """A step of a slow clock takes a second, validation and saving nothing."""
    clock = [0.0]
    monkeypatch.setattr(ex2_training.time, "monotonic", lambda: clock[0])
    real_train = ex2_main.train

    def slow_train(*args, after_step=None, **options):
        def slow_after_step():
            clock[0] += 1.0
            return after_step()

        return real_train(*args, after_step=after_step and slow_after_step, **options)

    monkeypatch.setattr(ex2_main, "train", slow_train)
    config = tiny_config(tmp_path, epochs=9, max_minutes=5 / 60, log_interval=1, warmup_steps=0)
    ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    saved = ckpt.load_checkpoint(config.run_dir)
    assert (saved["step"], saved["epoch"], saved["seconds"]) == (5, 1, 5.0)  # epochs of 3 steps: in the middle of one
    assert saved["scheduler"]["_last_lr"] == [pytest.approx(0.5e-3 * (1 + math.cos(0.8 * math.pi)), rel=1e-6)]
    rows = RunLog.read(config.run_dir / "log.csv")
    rates = [float(row["lr"]) for row in rows if row["lr"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == 5
    assert [(row["step"], row["epoch"]) for row in rows if row["val_loss"]] == [("3", "0"), ("5", "1")]

    ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    assert ckpt.load_checkpoint(config.run_dir)["step"] == 5
    assert RunLog.read(config.run_dir / "log.csv") == rows


def test_compiled_training_is_training_and_its_checkpoint_has_no_prefix(tmp_path, diffusor, monkeypatch):
    """By a backend that needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(ex2_main, "announce", lambda *args: None)
    saved = {}
    for name in ("eager", "compiled"):
        small = {"epochs": 1, "dim_mults": (1,), "p_uncond": 0.0, "amp": "off"}
        config = tiny_config(tmp_path, run_name=name, compile=name == "compiled", **small)
        ex2_main.fit(config, tiny_splits(), diffusor, CPU)
        saved[name] = ckpt.load_checkpoint(config.run_dir)
    assert saved["eager"]["model"].keys() == saved["compiled"]["model"].keys()
    for name, weight in saved["eager"]["model"].items():
        torch.testing.assert_close(saved["compiled"]["model"][name], weight, rtol=0, atol=1e-4)


def test_a_way_to_optimise_is_this_machines_and_not_that_of_the_one_which_saved(tmp_path, diffusor):
    config = tiny_config(tmp_path, epochs=1)
    ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    saved = ckpt.load_checkpoint(config.run_dir)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = "of another machine"
    state = ex2_training.TrainingState(cfg.build_model(config, 3), config, "abc", 3, 3, CPU)
    state.load_weights(saved)
    assert state.optimizer.param_groups[0]["fused"] == state.optimizer.defaults["fused"] != "of another machine"


def test_dropout_is_for_training_alone_and_adds_no_weights():
    torch.manual_seed(0)
    with_dropout, without = (Unet(dim=8, dim_mults=(1, 2), dropout=share) for share in (0.5, 0.0))
    without.load_state_dict(with_dropout.state_dict(), strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 5])
    assert not torch.equal(with_dropout.train()(x, t), without.train()(x, t))
    assert torch.equal(with_dropout.eval()(x, t), without.eval()(x, t))


@torch.no_grad()
def test_weights_that_are_kept_standardised_follow_every_change():
    """In eval mode without gradients, where they are computed once."""
    torch.manual_seed(0)
    layer, other = WeightStandardizedConv2d(3, 4, 3).eval(), WeightStandardizedConv2d(3, 4, 3)
    x = torch.randn(1, 3, 8, 8)
    before = layer(x)
    assert layer.kept is not None and torch.equal(layer(x), before)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.weight.mul_(torch.linspace(0.5, 2, 27).reshape(3, 3, 3))
    other.weight.copy_(layer.weight)
    assert torch.equal(layer(x), other.train()(x))
    assert "kept" not in " ".join(layer.state_dict())


def test_weights_that_are_kept_standardised_follow_an_optimiser_that_changes_all_in_one_pass():
    torch.manual_seed(0)
    layer = WeightStandardizedConv2d(3, 4, 3)
    optimizer, x = ex2_training.build_optimizer(layer, 0.5), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = layer.eval()(x)
    layer.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer.eval()(x)
        assert torch.equal(after, layer.train()(x)) and not torch.equal(after, before)


# ------------------------------------------------------------------ 2.2 e: test


def test_test_is_in_eval_mode_without_gradients_or_dropped_labels_and_restores_the_mode(model, diffusor):
    seen = []

    class Probe(Unet):
        def forward(self, x, t, classes=None):
            seen.append((self.training, torch.is_grad_enabled(), classes.tolist()))
            return super().forward(x, t, classes)

    probe = Probe(dim=8, dim_mults=(1, 2), class_free_guidance=True, num_classes=3, p_uncond=1.0).train()
    loader = make_loader(random_set(6), 4, CPU, flip=True)
    ex2_main.test(probe, loader, diffusor, CPU, SKELETON_ARGS)
    assert probe.training
    assert {(mode, grad) for mode, grad, _ in seen} == {(False, False)}
    assert [0, 1, 2, 0] in [labels for _, _, labels in seen]


def test_test_losses_are_fixed_whatever_the_global_seed_and_batch_size(model, diffusor):
    results = []
    for seed, batch_size in ((0, 3), (1, 8)):
        torch.manual_seed(seed)
        results.append(ex2_main.test(model, make_loader(random_set(8), batch_size, CPU), diffusor, CPU, SKELETON_ARGS))
    assert results[0]["t"] == results[1]["t"] == evenly_spaced(50, 10)
    assert results[0]["l2"] == pytest.approx(results[1]["l2"], rel=1e-4)
    assert results[0]["l1"] == pytest.approx(results[1]["l1"], rel=1e-4)


def test_losses_of_known_predictors(diffusor):
    loader = make_loader(random_set(30, size=32), 8, CPU)
    zero = loss_over_timesteps(lambda x, t: torch.zeros_like(x), loader, diffusor, [0, 20, 49])
    assert zero["images"] == 30
    assert zero["l2"] == pytest.approx([1, 1, 1], abs=0.02)
    assert zero["l1"] == pytest.approx([0.798] * 3, abs=0.02)
    few = loss_over_timesteps(lambda x, t: torch.zeros_like(x), loader, diffusor, [0], max_images=11)
    assert few["images"] == 11


@pytest.mark.parametrize("length, count", [(1000, 10), (50, 2), (5, 10), (1, 3), (33, 9)])
def test_evenly_spaced_indices_have_both_ends(length, count):
    indices = evenly_spaced(length, count)
    assert indices == sorted(set(indices)) and len(indices) == min(count, length)
    assert indices[0] == 0 and indices[-1] == length - 1


# ------------------------------------------------------------------ checkpoints


def test_checkpoint_is_plain_and_without_foreign_prefixes(tmp_path, diffusor):
    config = tiny_config(tmp_path, epochs=1)
    ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    saved = torch.load(config.run_dir / "ckpt.pt", weights_only=True)
    assert cfg.Config(**saved["config"]) == config
    assert saved["class_names"] == ["a", "b", "c"] and saved["epoch"] == 1 and saved["step"] == 3
    assert not [k for part in ("model", "ema") for k in saved[part] if "module." in k or "_orig_mod" in k]
    assert not list(config.run_dir.glob("*.tmp"))


def test_every_epoch_has_its_own_order(tmp_path, diffusor, monkeypatch):
    orders = []
    real_train = ex2_main.train

    def remember(model, loader, *rest, **options):
        orders.append(torch.cat([images.flatten(1)[:, 0] for images, _ in loader]).tolist())
        return real_train(model, loader, *rest, **options)

    monkeypatch.setattr(ex2_main, "train", remember)
    monkeypatch.setattr(ex2_main, "announce", lambda *args: None)
    ex2_main.fit(tiny_config(tmp_path, epochs=3, flip=False), tiny_splits(), diffusor, CPU)
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_resuming_with_other_settings_names_them(tmp_path, diffusor):
    ex2_main.fit(tiny_config(tmp_path, epochs=1), tiny_splits(), diffusor, CPU)
    with pytest.raises(InputError, match=r"--batch_size 16 there, 20 now.*--run_name"):
        ex2_main.fit(tiny_config(tmp_path, epochs=1, batch_size=20), tiny_splits(), diffusor, CPU)


def test_resuming_on_other_classes_names_them(tmp_path, diffusor):
    config, splits = tiny_config(tmp_path, epochs=1), tiny_splits()
    ex2_main.fit(config, splits, diffusor, CPU)
    splits.class_names = ("a", "b", "z")
    with pytest.raises(InputError, match=r"other classes \(a, b, c there, a, b, z now\)"):
        ex2_main.fit(config, splits, diffusor, CPU)


def test_a_run_goes_on_where_its_data_has_moved(tmp_path, diffusor):
    here = tiny_config(tmp_path, epochs=1, dataset="folder", data_dir="/here")
    ex2_main.fit(here, tiny_splits(), diffusor, CPU)
    moved = tiny_config(tmp_path, epochs=1, dataset="folder", data_dir="/elsewhere", num_workers=3)
    ex2_main.fit(moved, tiny_splits(), diffusor, CPU)


def test_a_half_written_row_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    RunLog(path).write(step=3, epoch=0, epoch_loss=0.5)
    with path.open("a") as file:
        file.write("4,0")
    assert [row["step"] for row in RunLog(path, 1, 3).rows()] == ["3"]


def test_rows_of_what_has_to_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    log = RunLog(path)
    for step in (2, 4, 5):
        log.write(step=step, epoch=0, train_loss=0.1)
    log.write(step=5, epoch=0, epoch_loss=0.1, val_loss=0.1)
    log.write(step=7, epoch=1, train_loss=0.1)
    # The first epoch is trained but not validated; then validated; then one step of the second is done.
    for epochs_done, step, wanted in ((0, 4, [2, 4]), (0, 5, [2, 4, 5]), (1, 5, [2, 4, 5, 5]), (1, 7, [2, 4, 5, 5, 7])):
        copy = tmp_path / "copy.csv"
        copy.write_bytes(path.read_bytes())
        assert [int(row["step"]) for row in RunLog(copy, epochs_done, step).rows()] == wanted


def test_checkpoints_of_another_version_are_refused():
    for content in ({}, {"config": {"no_such_field": 1}}):
        with pytest.raises(InputError, match="not this version's"):
            cfg.config_of(content, {})


def test_finished_run_is_not_trained_again(tmp_path, diffusor, capsys):
    config = tiny_config(tmp_path, epochs=1)
    first = ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    before = (config.run_dir / "ckpt.pt").read_bytes()
    again = ex2_main.fit(config, tiny_splits(), diffusor, CPU)
    assert "3 of 3 steps (1 of 1 epochs) are done" in capsys.readouterr().out
    assert (config.run_dir / "ckpt.pt").read_bytes() == before
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated", "other"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    if content == "truncated":
        ckpt.save_checkpoint(path, model={"w": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "other":
        torch.save({"w": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"ckpt\.pt is (damaged|no checkpoint)"):
        ckpt.load_checkpoint(path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    ckpt.save_checkpoint(path, epoch=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt.os, "fsync", full)
    with pytest.raises(OSError):
        ckpt.save_checkpoint(path, epoch=2)
    assert ckpt.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"], "nothing is left behind on the full disk"


def test_step_time_is_measured_without_changing_anything(tmp_path, diffusor, model):
    config = tiny_config(tmp_path)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    seconds = ex2_main.seconds_per_step(config, model, diffusor, make_loader(random_set(40), 16, CPU, train=True))
    assert 0 < seconds < 10
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_configs_of_a_checkpoint_can_be_changed_for_sampling(tmp_path):
    config = tiny_config(tmp_path)
    changed = cfg.config_of({"config": dataclasses.asdict(config)}, {"sampler": "ddim", "sample_steps": 5})
    wanted = {"guidance_scale": 1.0, "sampler": "ddim", "steps": 5, "eta": 0.0, "guidance_interval": (0.0, 1.0)}
    assert changed.sampling == wanted
    assert changed.dim_mults == (1, 2)
