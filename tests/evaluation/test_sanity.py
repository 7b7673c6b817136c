"""Is this normal? A made-up run that is like a made-up one of ours is; each planted fault is named, and no other."""

import copy
import json

import made_up
import pytest
import torch

from ex2.data.sets import DATASETS
from ex2.evaluation import sanity
from ex2.evaluation.sanity import images_seen, loss_at, reference_of, verdict
from ex2.report.answers import CLEAR
from ex2_diffusion import SCHEDULES, Diffusion, evenly_spaced

NORMAL = ["Nothing is off, also beside our run on shapes (16,000 images)."]


@pytest.fixture(autouse=True)
def reference(tmp_path, monkeypatch):
    """A run of ours with the losses of `made_up`, after 16,000 and, far better, after a million images."""
    curve = {"log_snr": made_up.LOG_SNR, "conditional": {"l2": made_up.L2}, "unconditional": {"l2": made_up.L2}}
    samples = {"features": "small classifier", "count": 500, "own_scale": 1.0, "frechet_distance": 1.8}
    better = {"l2": [loss / 2 for loss in made_up.L2]}
    points = [{"images": 16_000, **curve, "samples": samples}]
    points.append({"images": 10**6, **curve, "conditional": better})
    path = tmp_path / "reference.json"
    runs = {"image_size": 16, "points": points}
    path.write_text(json.dumps({"shapes": runs, "CIFAR-10 photographs": {**runs, "image_size": 32}}))
    monkeypatch.setattr(sanity, "REFERENCE", path)


@pytest.fixture
def run():
    """(config, report, log) of a run in which all is right."""
    return vars(made_up.config(batch_size=16)), made_up.metrics(), made_up.log_rows()


def scale(report, factor, names=("test", "train", "test_unconditional"), timesteps=slice(None)):
    for name in names:
        losses = report["losses"][name]["l2"]
        losses[timesteps] = [factor * loss for loss in losses[timesteps]]


def lazy(report, log):
    report["losses"]["test"]["l2"][-1] = 0.9


def diverged(report, log):
    scale(report, 1.6, timesteps=slice(0, 1))


def small_range(report, log):
    report["losses"]["test"]["x_zero_l2"][-1] = 0.01


def below_the_optimum(report, log):
    report["losses"]["optimal"]["l2"] = [1.4 * loss for loss in made_up.L2]


def by_heart(report, log):
    scale(report, 0.5, ["train"])


def no_labels(report, log):
    report["losses"]["test_unconditional"] = copy.deepcopy(report["losses"]["test"])


def no_guidance(report, log):
    for row in report["samples"]["by_scale"]:
        row["class_accuracy"] = 0.11


def late_ema(report, log):
    log[-2]["val_loss"] = "0.2"


def bad_at_one_level(report, log):
    scale(report, 1.6, timesteps=slice(3, 4))


def bad_samples(report, log):
    for row in report["samples"]["by_scale"]:
        row["frechet_distance"] *= 3


FAULTS = {
    lazy: "nearly pure noise",
    diverged: "that of a guess of zero",
    small_range: "whether their values fill the range",
    below_the_optimum: "below the optimal loss",
    by_heart: "memorise these",
    no_labels: "labels are wrong, or dropped too often",
    no_guidance: "Guidance has no effect: 11% of samples",
    late_ema: "the EMA is behind",
    bad_at_one_level: "times ours at log-SNR -2",
    bad_samples: "The Fréchet distance of its samples is 6, of ours 1.8",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_no_other(run, fault):
    config, report, log = run
    assert verdict(config, report, log) == NORMAL
    fault(report, log)
    said = verdict(config, report, log)
    assert len(said) == 1 and FAULTS[fault] in said[0]


@pytest.mark.parametrize("factor, normal", [(0.5, True), (1.25, True), (1.35, False)])
def test_a_loss_is_off_from_30_percent_on(run, factor, normal):
    config, report, log = run
    scale(report, factor, timesteps=slice(1, 4))
    assert (verdict(config, report, log) == NORMAL) == normal


def test_a_run_is_compared_with_ours_after_as_many_images(run):
    config, report, log = run
    assert images_seen(config, log) == 16_000
    said = verdict(config, report, made_up.log_rows(steps=10**6 // 16))
    assert len(said) == 1 and "2 times ours at log-SNR -2" in said[0] and "1,000,000" in said[0]
    assert verdict(config, report, made_up.log_rows(steps=100)) == ["Nothing is off."]


@pytest.mark.parametrize("dataset, size, name", [("shapes", 16, "shapes"), ("cifar10", 32, "CIFAR-10 photographs")])
def test_a_run_is_compared_with_ours_on_such_data_of_that_size_alone(dataset, size, name):
    config = {"dataset": dataset, "image_size": size, "class_free_guidance": True}
    assert reference_of(config, 10**7)["name"] == name
    assert reference_of({**config, "image_size": 64}, 10**7) is None


def test_a_folder_of_images_is_not_compared_with_cifar10(run):
    config, report, log = run
    scale(report, 1.25)
    report["losses"]["test"]["l2"][3] *= 4
    for dataset in ("folder", "butterflies"):
        given = {**config, "dataset": dataset, "image_size": 32}
        assert verdict(given, report, made_up.log_rows(10**6)) == ["Nothing is off."]


def test_the_labels_of_a_single_class_are_not_called_wrong(run):
    config, report, log = run
    no_labels(report, log)
    no_guidance(report, log)
    assert len(verdict(config, report, log)) == 2
    report["classes"] = 1
    assert verdict(config, report, log) == NORMAL


def test_losses_of_test_images_are_all_that_is_needed(run):
    config, report, log = run
    assert verdict(config, {"losses": {"test": report["losses"]["test"]}}, []) == ["Nothing is off."]


def test_loss_is_read_between_the_tested_timesteps():
    curve = {"t": [0, 50, 99], "log_snr": [8.0, 0.0, -8.0], "l2": [0.8, 0.2, 0.05]}
    assert loss_at(curve, 0) == pytest.approx(0.2)
    assert loss_at(curve, 4) == pytest.approx(0.4)  # halfway between the logarithms


@pytest.mark.parametrize("s", [0.1, 0.5])
def test_reading_between_the_timesteps_favours_no_schedule(s):
    # The optimal denoiser's loss depends on the log-SNR alone, so whatever differs here is an error of reading.
    found = []
    for schedule in SCHEDULES.values():
        diffusor = Diffusion(1000, schedule, 4, "cpu")
        t = torch.tensor(evenly_spaced(1000, 10))
        abar = diffusor.alphas_bar[t].double()
        loss = abar * s**2 / (abar * s**2 + 1 - abar)
        found.append(loss_at({"log_snr": diffusor.log_snr[t].tolist(), "l2": loss.tolist()}, -2))
    assert max(found) / min(found) < CLEAR


def test_the_committed_reference_has_what_is_compared(monkeypatch):
    monkeypatch.undo()
    reference = json.loads(sanity.REFERENCE.read_text("utf-8"))
    assert set(reference) == {dataset.reference for dataset in DATASETS.values()} - {""}
    for runs in reference.values():
        assert [point["images"] for point in runs["points"]] == sorted(point["images"] for point in runs["points"])
        for point in runs["points"]:
            assert len(point["log_snr"]) == len(point["conditional"]["l2"]) == len(point["unconditional"]["l2"])
