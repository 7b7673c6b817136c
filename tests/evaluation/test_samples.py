"""Samples are judged against the training images, and every figure says what it is of (2.2 e)."""

import io
import json
import sys
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tiny import TINY, without_evaluation

import ex2_main
from ex2.data.images import training_images
from ex2.evaluation import classifier, tables
from ex2.evaluation import samples as evaluation_samples
from ex2.evaluation.classifier import SmallClassifier
from ex2.evaluation.evaluate import evaluate
from ex2.report import study
from ex2.settings.build import build_diffusion, load_data, restore_model
from ex2.settings.config import Config, config_of
from ex2.training import checkpoint
from ex2_diffusion import Diffusion


@pytest.fixture(scope="module")
def results(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional and a tiny unconditional run, both judged."""
    folder = tmp_path_factory.mktemp("results")
    for name, flags in (("cond", ["--class_free_guidance"]), ("plain", [])):
        with pytest.MonkeyPatch.context() as patch:
            without_evaluation(patch)
            assert ex2_main.main([*TINY, "--results_dir", str(folder), "--run_name", name, *flags]) == 0
        judged = ["test", "--no_cuda", "--checkpoint", str(folder / name), "--eval_samples", "140"]
        assert ex2_main.main([*judged, "--sample_batch", "50"]) == 0
    return folder


def samples_of(folder):
    return json.loads((folder / "test_metrics.json").read_text())["samples"]


def test_every_figure_says_what_it_is_of(results):
    samples = samples_of(results / "cond")
    head = {name: samples[name] for name in ("weights", "reference", "count", "sampler", "steps", "eta", "seed")}
    assert head == {
        "weights": "ema",
        "reference": "train and val, 1000 images",
        "count": 140,
        "sampler": "ddpm",
        "steps": 3,
        "eta": 0.0,
        "seed": 1,
    }
    assert "small classifier" in samples["features"] and "FID" not in json.dumps(samples)
    assert [row["guidance_scale"] for row in samples["by_scale"]] == [-1, 0, 1, 3]
    figures = {"count", "frechet_distance", "kid", "kid_deviation", "precision", "recall", "precision_recall_count"}
    for row in samples["by_scale"]:
        assert set(row) == {"guidance_scale", "class_accuracy", *figures}
    assert set(samples["test_images"]) == {"class_accuracy", *figures}
    assert set(samples["noise"]) == figures


def test_test_images_are_nearer_than_samples_and_noise_is_farther(results):
    samples = samples_of(results / "cond")
    worst = max(row["frechet_distance"] for row in samples["by_scale"])
    assert samples["test_images"]["frechet_distance"] < worst
    assert samples["test_images"]["frechet_distance"] < samples["noise"]["frechet_distance"]
    assert samples["test_images"]["class_accuracy"] > 0.9


def test_an_unconditional_model_is_judged_at_one_scale_without_classes(results):
    samples = samples_of(results / "plain")
    assert [row["guidance_scale"] for row in samples["by_scale"]] == [0]
    assert "class_accuracy" not in samples["by_scale"][0] and "class_accuracy" not in samples["test_images"]
    assert not (results / "plain" / "guidance_curve.png").exists()
    assert (results / "cond" / "guidance_curve.png").exists()


def test_both_runs_share_one_classifier(results):
    assert len(list((results / "features").iterdir())) == 1
    assert samples_of(results / "plain")["features"] == samples_of(results / "cond")["features"]


def test_judging_repeats_itself_whatever_the_batch_size(results, tmp_path):
    first = samples_of(results / "cond")["by_scale"][1]
    evaluator = ["test", "--checkpoint", str(results / "cond"), "--out", str(results / "again"), "--no_cuda"]
    assert ex2_main.main([*evaluator, "--eval_samples", "140", "--sample_batch", "140", "--eval_scales", "0"]) == 0
    rows = samples_of(results / "again")["by_scale"]
    assert [row["guidance_scale"] for row in rows] == [0, 1]  # the run's own scale is always among them
    assert rows[0]["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-3)
    assert rows[0]["class_accuracy"] == pytest.approx(first["class_accuracy"], abs=0.01)


@pytest.mark.parametrize("mirrored", [False, True])
def test_memorised_images_are_found(splits, tmp_path, mirrored):
    images, _ = training_images(splits)
    model = SmallClassifier(10, 16).eval()
    evaluator = classifier.Evaluator(model, model.features(images.images), images)
    copied = images.images[torch.tensor([5, 900, 17, 60])]
    copied = copied.flip(-1) if mirrored else copied
    samples, real = (
        evaluation_samples.extract_features(evaluator, [(part, None)], "cpu")
        for part in (copied, splits.test.images[:30])
    )
    report = evaluation_samples.check_memorisation(evaluator, samples, real, "cpu", tmp_path / "nearest.png")
    assert report["images"] == {"samples": 4, "test_images": 30}
    for space in ("pixels", "features"):
        assert report[space]["median"]["samples"] < 0.01 < report[space]["median"]["test_images"]
        assert report[space]["fraction_nearer"] == 1
    assert imageio.imread(tmp_path / "nearest.png").shape[1] > 4 * 64
    fresh = evaluation_samples.check_memorisation(evaluator, real, real, "cpu", tmp_path / "nearest.png")
    assert fresh["pixels"]["fraction_nearer"] == pytest.approx(0.05, abs=0.03)


class Scribe:
    """Stands for a conditional model: writes down the labels it is asked for, and predicts what depends on them."""

    class_free_guidance, null_class = True, 10

    def __init__(self):
        self.labels = []

    def __call__(self, x, t, labels):
        self.labels.append(labels.tolist())
        return x + 0.1 * labels.reshape(-1, 1, 1, 1)


def test_samples_are_of_their_labels_and_at_their_scale(splits):
    config = Config(dataset="shapes", image_size=8, dim_mults=(1, 2), class_free_guidance=True, timesteps=2)
    config = replace(config, schedule="cosine", sample_batch=3)
    diffusor, labels = build_diffusion(config, "cpu"), torch.tensor([4, 2, 9, 0, 1])
    seen = {}
    for scale in (-1, 0, 2):
        model = Scribe()
        batches = list(evaluation_samples.sampled_batches(model, diffusor, config, labels, scale))
        assert torch.cat([wanted for _, wanted in batches]).tolist() == labels.tolist()
        seen[scale] = model.labels[0]
        assert len(torch.cat([images for images, _ in batches])) == 5
    assert seen == {-1: [10, 10, 10], 0: [4, 2, 9], 2: [4, 2, 9, 10, 10, 10]}


def test_precision_is_of_the_samples_and_recall_of_the_training_images():
    g = torch.Generator().manual_seed(0)
    evaluator = classifier.Evaluator(None, torch.randn(300, 2, generator=g), None)
    alike = evaluation_samples.ImageFeatures(0.05 * torch.randn(300, 2, generator=g), torch.zeros(1), None)
    figures = evaluation_samples.compare(evaluator, alike)
    assert figures["precision"] > 0.9 and figures["recall"] < 0.2 and figures["precision_recall_count"] == 300


def test_too_few_images_for_a_figure_have_none():
    evaluator = classifier.Evaluator(None, torch.randn(300, 2), None)
    few = evaluation_samples.ImageFeatures(torch.randn(2, 2), torch.zeros(1), None)
    figures = evaluation_samples.compare(evaluator, few)
    assert {name for name, value in figures.items() if value is None} == {
        *("frechet_distance", "kid", "kid_deviation", "precision", "recall")
    }


def test_memorisation_is_checked_at_the_runs_own_scale(results, monkeypatch):
    checked, described = [], {}
    real_describe = evaluation_samples.sampled_batches

    def batches(model, diffusor, config, labels, scale):
        described[scale] = [images for images, _ in real_describe(model, diffusor, config, labels, scale)]
        return ((images, None) for images in described[scale])

    monkeypatch.setattr(evaluation_samples, "sampled_batches", batches)
    monkeypatch.setattr(tables, "print_samples", lambda report: None)
    monkeypatch.setattr(evaluation_samples, "check_memorisation", lambda evaluator, own, *rest: checked.append(own))
    saved = checkpoint.load_checkpoint(results / "cond")
    config = config_of(saved, {})
    model, diffusor = restore_model(saved, config, "cpu"), build_diffusion(config, "cpu")
    splits = load_data(config)
    evaluator = evaluation_samples.build_evaluator(splits, "cpu", config, results / "cond", 130, [3, 0])
    evaluation_samples.evaluate_samples(evaluator, model, splits, diffusor, config)
    assert list(described) == [0, 1, 3]
    assert torch.equal(checked[0].pixels, torch.cat(described[1]))
    assert not torch.equal(checked[0].pixels, torch.cat(described[3]))


def test_only_features_are_kept_of_many_images(monkeypatch):
    model = SmallClassifier(10, 8).eval()
    evaluator = classifier.Evaluator(model, None, None, model.classify)
    images = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    label = int(model.classify(images[:1]))
    batches = ((images, torch.full((100,), label if i < 3 else label + 1)) for i in range(9))
    described = evaluation_samples.extract_features(evaluator, batches, "cpu")
    assert described.features.shape == (900, 128) and described.pixels.shape == (256, 3, 8, 8)
    assert described.class_accuracy == pytest.approx(1 / 3)


def test_figures_of_samples_stay_when_the_same_weights_are_tested_without_them(results):
    before = json.loads((results / "cond" / "test_metrics.json").read_text())
    test = ["test", "--checkpoint", str(results / "cond"), "--eval_samples", "0", "--no_cuda"]
    assert ex2_main.main(test) == 0
    assert json.loads((results / "cond" / "test_metrics.json").read_text()) == before


def test_figures_are_written_before_they_are_printed_in_any_encoding(results, monkeypatch):
    """Of a dry run, which judges a handful and leaves no classifier behind."""
    before = sorted((results / "features").iterdir())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp932"))
    assert ex2_main.main(["test", "--no_cuda", "--checkpoint", str(results / "cond"), "--dry_run"]) == 0
    assert sorted((results / "features").iterdir()) == before
    assert samples_of(results / "cond-dry_run")["count"] == evaluation_samples.DRY_RUN_SAMPLES


def test_raw_weights_can_be_judged_and_are_named(results, tmp_path):
    flags = ["--weights", "raw", "--eval_samples", "0", "--out", str(tmp_path), "--no_cuda"]
    assert ex2_main.main(["test", "--no_cuda", "--checkpoint", str(results / "cond"), *flags]) == 0
    raw = json.loads((tmp_path / "test_metrics.json").read_text())
    assert raw["weights"] == "raw"
    assert raw["losses"] != json.loads((results / "cond" / "test_metrics.json").read_text())["losses"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval_samples 128", "128 are too few for features of width 128: give more"),
        ("--eval_samples -1", "--eval_samples must be at least 0"),
        ("--eval_samples 0 --eval_scales 1", "drop --eval_samples 0"),
        ("--eval_scales nan", "must lie within"),
        (
            "--eval_samples 3000 --inception_weights nowhere.pth",
            "1000 training images are too few for features of width 2048",
        ),
        ("--image_size 16", "--image_size is fixed by the checkpoint"),
        ("--no_flip", "--no_flip is fixed by the checkpoint"),
        ("--scales 1", "test does not know --scales: did you mean --eval_scales?"),
        ("--weights best", "invalid choice: 'best'"),
    ],
)
def test_bad_requests_are_one_line(results, capsys, flags, message):
    assert ex2_main.main(["test", "--checkpoint", str(results / "cond"), "--no_cuda", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_scales_of_an_unconditional_model_are_refused(results, capsys):
    assert ex2_main.main(["test", "--no_cuda", "--checkpoint", str(results / "plain"), "--eval_scales", "1"]) == 2
    assert "this model can't be guided" in capsys.readouterr().err


def test_missing_and_misfitting_weights_are_one_line(results, tmp_path, capsys):
    saved = checkpoint.load_checkpoint(results / "cond")
    content = {name: value for name, value in saved.items() if name != "ema"}
    checkpoint.save_checkpoint(tmp_path / "ckpt.pt", **content)
    assert ex2_main.main(["test", "--no_cuda", "--checkpoint", str(tmp_path)]) == 2
    assert "is no checkpoint of a run of this program: ema is not what it writes" in capsys.readouterr().err
    checkpoint.save_checkpoint(tmp_path / "ckpt.pt", **{**saved, "config": {**saved["config"], "dim": 16}})
    assert ex2_main.main(["sample", "--no_cuda", "--checkpoint", str(tmp_path)]) == 2
    assert "weights don't fit the model its settings describe" in capsys.readouterr().err


def test_tables_show_four_digits_and_a_dash_for_nothing():
    assert [tables.format_cell(v) for v in (True, False)] == ["True", "False"]
    assert [tables.format_cell(v) for v in (0.123456, None, "", "cosine", 123456.7, np.float64(2), "007")] == [
        "0.1235",
        "-",
        "-",
        "cosine",
        "123457",
        "2",
        "007",
    ]


def test_all_samples_of_a_run_are_drawn_in_the_precision_of_its_training(results, tmp_path, monkeypatch):
    """The class accuracy after a training and the pictures of studies were drawn in float32, others in bfloat16."""
    drawn = []

    def sample(self, model, image_size, batch_size=16, channels=3, **sampling):
        drawn.append(model.predict.args[1])
        return torch.zeros(batch_size, channels, image_size, image_size)

    monkeypatch.setattr(Diffusion, "sample", sample)
    monkeypatch.setattr(evaluation_samples, "computes_in_bfloat16", lambda amp, device: True)
    saved = checkpoint.load_checkpoint(results / "cond")
    config = config_of(saved, {"dry_run": True, "results_dir": str(results)})
    model, diffusor = restore_model(saved, config, "cpu"), build_diffusion(config, "cpu")
    evaluate(model, load_data(config), diffusor, config)
    study.draw_side_by_side({"cond": config_of(saved, {})}, tmp_path / "samples.png", "cpu")
    assert len(drawn) >= 2 and all(drawn)
