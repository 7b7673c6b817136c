"""The networks that describe images, their cache, and the judging of samples as `test` does it (2.2 e, 2.4 c)."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from ex2.data import images as data_images
from ex2.data.images import ImageFiles, ImageSet
from ex2.errors import InputError
from ex2.evaluation import classifier
from ex2.evaluation.classifier import (
    Inception,
    SmallClassifier,
    accuracy,
    evaluator_by_classifier,
    load_or_compute,
    train_classifier,
    training_images,
)

pytestmark = pytest.mark.usefixtures("small_shapes")


# ------------------------------------------------------------------ training images


def test_training_images_do_not_depend_on_how_the_seed_split_them(splits):
    train, val = data_images.split_off(training_images(splits)[0], seed=7)
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
    splits = data_images.DataSplits(parts[0], parts[1], parts[0], ("a",))
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
    model = train_classifier(splits.train, 10, "cpu", flip=True, epochs=4)
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
    assert classifier.randomly_shifted(images.float()).shape == images.shape


def test_of_one_class_the_classifier_learns_quarter_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_EPOCHS", 6)
    model = SmallClassifier(1, 16)
    images = torch.arange(8.0)[:, None, None, None] * torch.ones(1, 3, 16, 16)
    images[:, :, 0] = 99  # the upper row
    turned, labels = model.task(images, torch.zeros(8, dtype=torch.long))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert turned[:, 0, 8, 8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # every image once
    edges = [turned[0, 0, 0], turned[2, 0, :, 0], turned[4, 0, -1], turned[6, 0, :, -1]]
    assert all((edge == 99).all() for edge in edges)
    # Landscapes, bright above and dark below, whose turns can be told.
    sky = torch.randint(0, 256, (600, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) // 2
    sky[:, :, :6] += 120
    parts = [ImageSet(part, torch.zeros(len(part), dtype=torch.long)) for part in sky.split(200)]
    reference = evaluator_by_classifier(data_images.DataSplits(*parts, ("landscape",)), tmp_path, "cpu", flip=True)
    assert "of the quarter turns of test images right" in reference.extractor.description
    assert float(reference.extractor.description.split(", ")[1].split("%")[0]) > 90


def test_shifts_move_the_batch_by_whole_pixels():
    images = torch.arange(32.0).expand(1, 1, 32, 32)
    torch.manual_seed(0)
    middles = {classifier.randomly_shifted(images)[0, 0, 16, 16].item() for _ in range(100)}
    assert middles == {14, 15, 16, 17, 18}


def test_the_classifier_is_trained_once_per_data_set_and_named_by_its_weights(splits, tmp_path, capsys):
    first = evaluator_by_classifier(splits, tmp_path, "cpu", flip=True)
    assert "training the classifier" in capsys.readouterr().out
    second = evaluator_by_classifier(splits, tmp_path, "cpu", flip=True)
    assert capsys.readouterr().out == ""
    assert (
        first.extractor.description == second.extractor.description
        and "classes of test images right" in first.extractor.description
    )
    images = splits.test.images[:20]
    assert torch.equal(first.extractor.features(images), second.extractor.features(images))
    assert torch.equal(first.features, second.features) and first.features.shape == (1000, 128)
    assert torch.allclose(first.features[:20], first.extractor.features(first.images.images[:20]), rtol=1e-3, atol=1e-3)
    other = evaluator_by_classifier(splits, tmp_path, "cpu", flip=False).extractor
    assert other.description.split(",")[0] != first.extractor.description.split(",")[0]  # the digest of its weights


def test_a_folder_that_cannot_be_written_to_costs_only_the_next_call(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert load_or_compute(tmp_path / "file" / "cache.pt", lambda: {"figure": 1})["figure"] == 1
    assert "can't keep" in capsys.readouterr().out


def test_a_damaged_cache_is_said_and_made_anew(tmp_path, capsys):
    path = tmp_path / "new" / "cache.pt"
    assert load_or_compute(path, lambda: {"figure": 1})["figure"] == 1
    assert load_or_compute(path, lambda: {"figure": 2})["figure"] == 1
    path.write_bytes(path.read_bytes()[:100])
    assert load_or_compute(path, lambda: {"figure": 3})["figure"] == 3
    assert "computing it anew" in capsys.readouterr().out
    assert load_or_compute(path, lambda: {"figure": 4})["figure"] == 3


# ------------------------------------------------------------------ Inception


def test_inception_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="pip install -r requirements-extras.txt"):
        Inception("weights.pth")


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
def test_missing_or_other_weights_than_those_of_fid_are_refused(tmp_path, monkeypatch, content):
    import torchmetrics.image.fid  # noqa: F401  before the stand-in: it looks for torch_fidelity, too

    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*download https://github.com/toshas/torch-fidelity"):
        Inception(path)


def test_inception_resizes_as_the_original_fid_does(tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="an extra")
    path = tmp_path / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        untrained = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(untrained.state_dict(), path)
    with pytest.raises(InputError, match="is not the file behind FID"):
        Inception(path)
    monkeypatch.setattr(classifier, "INCEPTION_SHA256", "")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = Inception(path).features(images)
    assert torch.allclose(features, untrained(images)[0], rtol=1e-4, atol=1e-4)
    assert features.shape == (2, Inception.width)
