"""The networks that describe images, their cache, and the judging of samples as `test` does it (2.2 e, 2.4 c)."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import imageio.v3 as imageio
import pytest
import torch

import ex2_config as cfg
import ex2_data
import ex2_evaluation
import ex2_features
import ex2_main
from ex2_data import ImageFiles, ImageSet, InputError, load_splits, training_images
from ex2_features import Inception, SmallClassifier, accuracy, cached, classifier_reference, train_classifier

TINY = "--dataset shapes --image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --batch_size 100 --epochs 1".split()
TINY += "--eval_images 20 --eval_timesteps 3 --sample_steps 3 --schedule cosine --no_cuda".split()


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    """Ten times fewer images than the data set has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex2_data, "SHAPES_COUNT", {"train": 1000, "test": 200})
        yield


@pytest.fixture(scope="module")
def splits(small_shapes):
    return load_splits("shapes", None, 16, seed=0)


# ------------------------------------------------------------------ training images


def test_training_images_do_not_depend_on_how_the_seed_split_them(splits):
    train, val = ex2_data.split_off(training_images(splits)[0], seed=7)
    other = replace(splits, train=train, val=val)
    assert not torch.equal(other.train.images, splits.train.images)
    (first, fingerprint), (second, again) = training_images(splits), training_images(other)
    assert fingerprint == again and torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels) and len(first) == 1000


def test_fingerprint_sees_a_pixel_and_a_label(splits):
    prints = {training_images(splits)[1]}
    for name in ("images", "labels"):
        train = ImageSet(splits.train.images.clone(), splits.train.labels.clone())
        getattr(train, name)[3] = (getattr(train, name)[3] + 1) % 10
        prints.add(training_images(replace(splits, train=train))[1])
    assert len(prints) == 3


def test_fingerprint_of_image_files(tmp_path):
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(bytes(i + 1))
    parts = [ImageFiles(tuple(part), torch.zeros(2, dtype=torch.long), 8) for part in (paths[:2], paths[2:])]
    splits = ex2_data.DataSplits(parts[0], parts[1], parts[0], ("a",))
    swapped = replace(splits, train=parts[1], val=parts[0])
    whole, fingerprint = training_images(splits)
    assert sorted(whole.paths) == paths and training_images(swapped)[1] == fingerprint
    paths[0].write_bytes(b"other content")
    assert training_images(splits)[1] != fingerprint


# ------------------------------------------------------------------ the classifier


def test_classifier_learns_the_shapes_and_repeats_itself(splits):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = train_classifier(splits.train, 10, "cpu", flip=True, epochs=6)
    assert torch.equal(torch.rand(2), expected)  # the global generator is left alone
    assert not model.training and accuracy(model, splits.test, "cpu") > 0.7
    few = splits.train.subset(torch.arange(129))  # its last batch is a single image
    first, second = (train_classifier(few, 10, "cpu", flip=True, epochs=1) for _ in range(2))
    assert torch.equal(first.features(splits.test.images), second.features(splits.test.images))


@pytest.mark.parametrize("size", [8, 16, 20, 32, 72, 128])
def test_classifier_takes_every_size(size):
    model = SmallClassifier(3, size).eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    assert model.features(images).shape == (2, SmallClassifier.width)
    assert model.classify(images).shape == (2,)
    assert ex2_features.randomly_shifted(images.float()).shape == images.shape


def test_shifts_move_the_batch_by_whole_pixels():
    images = torch.arange(32.0).expand(1, 1, 32, 32)
    torch.manual_seed(0)
    middles = {ex2_features.randomly_shifted(images)[0, 0, 16, 16].item() for _ in range(100)}
    assert middles == {14, 15, 16, 17, 18}


def test_the_classifier_is_trained_once_per_data_set(splits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ex2_features, "CLASSIFIER_EPOCHS", 1)
    first = classifier_reference(splits, tmp_path, "cpu", flip=True)
    assert "training the classifier" in capsys.readouterr().out
    second = classifier_reference(splits, tmp_path, "cpu", flip=True)
    assert capsys.readouterr().out == ""
    assert (
        first.extractor.description == second.extractor.description
        and "right on the test set" in first.extractor.description
    )
    images = splits.test.images[:20]
    assert torch.equal(first.extractor.features(images), second.extractor.features(images))
    assert torch.equal(first.features, second.features) and first.features.shape == (1000, 128)
    assert torch.allclose(first.features[:20], first.extractor.features(first.images.images[:20]), rtol=1e-3, atol=1e-3)


def test_a_damaged_cache_is_said_and_made_anew(tmp_path, capsys):
    path = tmp_path / "new" / "cache.pt"
    assert cached(path, lambda: {"figure": 1})["figure"] == 1
    assert cached(path, lambda: {"figure": 2})["figure"] == 1
    path.write_bytes(path.read_bytes()[:100])
    assert cached(path, lambda: {"figure": 3})["figure"] == 3
    assert "computing it anew" in capsys.readouterr().out
    assert cached(path, lambda: {"figure": 4})["figure"] == 3


# ------------------------------------------------------------------ Inception


def test_inception_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="pip install -r requirements-extras.txt"):
        Inception("weights.pth")


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
def test_missing_or_foreign_inception_weights_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*download https://github.com/toshas/torch-fidelity"):
        Inception(path)


def test_inception_with_weights_of_the_right_form(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="an extra")
    path = tmp_path / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        untrained = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(untrained.state_dict(), path)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = Inception(path).features(images)
    assert torch.allclose(features, untrained(images)[0], rtol=1e-4, atol=1e-4)  # resized as in the original FID
    assert features.shape == (2, Inception.width)


# ------------------------------------------------------------------ judging samples


@pytest.fixture(scope="module")
def results(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional and a tiny unconditional run, both judged."""
    folder = tmp_path_factory.mktemp("results")
    for name, flags in (("cond", ["--class_free_guidance"]), ("plain", [])):
        assert ex2_main.main([*TINY, "--results_dir", str(folder), "--run_name", name, *flags]) == 0
        judge = ["test", "--checkpoint", str(folder / name), "--eval_samples", "140", "--sample_batch", "50"]
        assert ex2_main.main([*judge, "--no_cuda"]) == 0
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
    figures = {"frechet_distance", "kid", "kid_deviation", "precision", "recall"}
    for row in samples["by_scale"]:
        assert set(row) == {"guidance_scale", "class_accuracy", *figures}
    assert set(samples["test_images"]) == {"count", "class_accuracy", *figures}
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
    judge = ["test", "--checkpoint", str(results / "cond"), "--out", str(results / "again"), "--no_cuda"]
    assert ex2_main.main([*judge, "--eval_samples", "140", "--sample_batch", "140", "--eval_scales", "0"]) == 0
    rows = samples_of(results / "again")["by_scale"]
    assert [row["guidance_scale"] for row in rows] == [0, 1]  # the run's own scale is always among them
    assert rows[0]["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-3)
    assert rows[0]["class_accuracy"] == pytest.approx(first["class_accuracy"], abs=0.01)


def test_memorised_images_are_found(splits, tmp_path):
    images, _ = training_images(splits)
    model = SmallClassifier(10, 16).eval()
    reference = ex2_features.Reference(model, model.features(images.images), images)
    judge = ex2_evaluation.Judge(reference, None)
    copied = images.images[torch.tensor([5, 900, 17, 60])]
    described = [ex2_evaluation.describe(judge, [(part, None)], "cpu") for part in (copied, splits.test.images[:30])]
    report = ex2_evaluation.check_memorisation(reference, *described, tmp_path / "nearest.png")
    assert report["images"] == {"samples": 4, "test_images": 30}
    for space in ("pixels", "features"):
        distance = report["median_distance"][space]
        assert distance["samples"] < 0.01 < distance["test_images"]
    assert imageio.imread(tmp_path / "nearest.png").shape[1] > 4 * 64


def test_only_features_are_kept_of_many_images(monkeypatch):
    model = SmallClassifier(10, 8).eval()
    judge = ex2_evaluation.Judge(ex2_features.Reference(model, None, None), model.classify)
    batches = ((torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.long)) for _ in range(9))
    described = ex2_evaluation.describe(judge, batches, "cpu")
    assert described.features.shape == (900, 128) and described.pixels.shape == (256, 3, 8, 8)
    assert described.class_accuracy in (0, 1)


def test_dry_run_judges_a_handful_and_leaves_no_classifier_behind(results):
    before = sorted((results / "features").iterdir())
    assert ex2_main.main(["test", "--checkpoint", str(results / "cond"), "--dry_run"]) == 0
    assert sorted((results / "features").iterdir()) == before
    assert samples_of(results / "cond-dry_run")["count"] == ex2_evaluation.DRY_RUN_SAMPLES


def test_raw_weights_can_be_judged_and_are_named(results, tmp_path):
    flags = ["--weights", "raw", "--eval_samples", "0", "--out", str(tmp_path), "--no_cuda"]
    assert ex2_main.main(["test", "--checkpoint", str(results / "cond"), *flags]) == 0
    raw = json.loads((tmp_path / "test_metrics.json").read_text())
    assert raw["weights"] == "raw"
    assert raw["losses"] != json.loads((results / "cond" / "test_metrics.json").read_text())["losses"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval_samples 128", "128 are too few for features of width 128: give more than 128"),
        ("--eval_samples -1", "--eval_samples must be at least 0"),
        ("--eval_samples 0 --eval_scales 1", "drop --eval_samples 0"),
        ("--eval_scales nan", "must lie within"),
        (
            "--eval_samples 3000 --inception_weights nowhere.pth",
            "1000 training images are too few for features of width 2048",
        ),
        ("--image_size 16", "--image_size is fixed by the checkpoint"),
        ("--no_flip", "--no_flip is fixed by the checkpoint"),
        ("--scales 1", "unrecognized arguments: --scales 1"),
        ("--weights best", "invalid choice: 'best'"),
    ],
)
def test_bad_requests_are_one_line(results, capsys, flags, message):
    assert ex2_main.main(["test", "--checkpoint", str(results / "cond"), "--no_cuda", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_scales_of_an_unconditional_model_are_refused(results, capsys):
    assert ex2_main.main(["test", "--checkpoint", str(results / "plain"), "--eval_scales", "1"]) == 2
    assert "this model can't be guided" in capsys.readouterr().err


def test_missing_and_misfitting_weights_are_one_line(results, tmp_path, capsys):
    saved = cfg.load_checkpoint(results / "cond")
    content = {name: value for name, value in saved.items() if name not in ("format", "ema")}
    cfg.save_checkpoint(tmp_path / "ckpt.pt", **content)
    assert ex2_main.main(["test", "--checkpoint", str(tmp_path)]) == 2
    assert "the checkpoint holds no ema weights: give --weights raw" in capsys.readouterr().err
    content["config"] = {**saved["config"], "dim": 16}
    cfg.save_checkpoint(tmp_path / "ckpt.pt", **content, ema=saved["ema"])
    assert ex2_main.main(["sample", "--checkpoint", str(tmp_path)]) == 2
    assert "weights don't fit the model its settings describe" in capsys.readouterr().err
