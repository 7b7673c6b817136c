"""Is this normal? Our own runs are; each fault is named, and no other is (2.2 e)."""

import copy
import json
from pathlib import Path

import pytest

from ex2.evaluation.sanity import images_seen, loss_at, reference_of, verdict
from ex2.machine.files import read_json
from ex2.training.log import RunLog

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick():
    """(config, report, log) of the committed run on shapes, with losses of training images."""
    folder = ROOT / "results" / "quick"
    report = read_json(folder / "test_metrics.json")
    losses = report["losses"]
    losses["train"] = copy.deepcopy(losses["test"])
    losses["floor"] = {**copy.deepcopy(losses["test"]), "l2": [loss / 3 for loss in losses["test"]["l2"]]}
    return read_json(folder / "config.json"), report, RunLog.read(folder / "log.csv")


@pytest.mark.parametrize("name", ["quick", "photographs"])
def test_our_own_runs_are_normal(name):
    folder = ROOT / "results" / name
    config, log = read_json(folder / "config.json"), RunLog.read(folder / "log.csv")
    assert verdict(config, read_json(folder / "test_metrics.json"), log)[0].startswith("Nothing is off, also beside")


def scale(report, name, factor, times=slice(None)):
    losses = report["losses"][name]["l2"]
    losses[times] = [factor * loss for loss in losses[times]]


def lazy(report, log):
    report["losses"]["test"]["l2"][-1] = 0.9


def diverged(report, log):
    report["losses"]["test"]["l2"][0] = 1.3


def small_range(report, log):
    report["losses"]["test"]["x_zero_l2"][-1] = 0.01


def below_the_floor(report, log):
    scale(report, "train", 0.2)
    scale(report, "test", 0.2)
    scale(report, "test_unconditional", 0.2)


def by_heart(report, log):
    scale(report, "train", 0.5)


def no_labels(report, log):
    report["losses"]["test_unconditional"] = copy.deepcopy(report["losses"]["test"])


def no_guidance(report, log):
    for row in report["samples"]["by_scale"]:
        row["class_accuracy"] = 0.11


def late_average(report, log):
    ends = [row for row in log if row["val_loss"]]
    ends[-2]["val_loss"], ends[-2]["epoch_loss"] = 2 * float(ends[-1]["val_loss"]), ends[-1]["epoch_loss"]


def bad_at_one_level(report, log):
    scale(report, "test", 1.6, slice(7, 9))
    scale(report, "test_unconditional", 1.6, slice(7, 9))


def bad_samples(report, log):
    for row in report["samples"]["by_scale"]:
        row["frechet_distance"] *= 3


@pytest.mark.parametrize(
    "fault, named",
    [
        (lazy, "nearly pure noise"),
        (diverged, "that of a guess of zero"),
        (small_range, "whether their values fill the range"),
        (below_the_floor, "below the floor"),
        (by_heart, "know these by heart"),
        (no_labels, "labels are wrong, or dropped too often"),
        (no_guidance, "Guidance has no effect: 11% of samples"),
        (late_average, "the average is behind"),
        (bad_at_one_level, "times ours at log-SNR -2"),
        (bad_samples, "The Fréchet distance of its samples"),
    ],
)
def test_a_fault_is_named_and_no_other(quick, fault, named):
    config, report, log = quick
    assert verdict(config, report, log)[0].startswith("Nothing is off")
    fault(report, log)
    said = verdict(config, report, log)
    assert len(said) == 1 and named in said[0]


def test_only_what_has_seen_as_much_is_compared_and_only_on_such_data(quick):
    config, report, log = quick
    seen = images_seen(config, log)
    assert seen == 1126 * 16
    assert reference_of(config, seen)["images"] <= 1.05 * seen
    assert reference_of(config, 10) is None
    assert reference_of({**config, "image_size": 32}, seen) is None
    assert reference_of({**config, "dataset": "butterflies", "image_size": 32}, 10**9) is None
    assert reference_of({**config, "dataset": "cifar10", "image_size": 32}, 10**9)["name"] == "CIFAR-10 photographs"
    assert verdict({**config, "image_size": 8}, report, log) == ["Nothing is off."]


def test_loss_is_read_between_the_tested_times():
    curve = {"t": [0, 50, 99], "log_snr": [8.0, 0.0, -8.0], "l2": [0.8, 0.2, 0.05]}
    assert loss_at(curve, 0) == pytest.approx(0.2)
    assert loss_at(curve, 4) == pytest.approx(0.4)  # halfway between the logarithms


def test_the_reference_has_what_is_compared():
    reference = json.loads((ROOT / "ex2_reference.json").read_text("utf-8"))
    for runs in reference.values():
        assert [point["images"] for point in runs["points"]] == sorted(point["images"] for point in runs["points"])
        for point in runs["points"]:
            assert len(point["log_snr"]) == len(point["conditional"]["l2"]) == len(point["unconditional"]["l2"])
