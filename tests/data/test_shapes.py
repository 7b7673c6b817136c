"""The embedded data set: ten classes of anti-aliased shapes, the same in every run."""

import numpy as np
import pytest
import torch

from ex2.data.load import load_splits
from ex2.data.sets import DATASETS
from ex2.data.shapes import DISTANCES, SHAPES, draw_shapes, load_shapes
from ex2.evaluation.templates import TemplateClassifier


@pytest.mark.parametrize("image_size", [8, 33])
def test_shapes_of_any_size_have_ten_balanced_classes(image_size):
    train, _, test, names = load_shapes(image_size)
    assert train.images.shape == (10_000, 3, image_size, image_size) and train.images.dtype == torch.uint8
    assert names == SHAPES
    assert torch.bincount(train.labels).tolist() == [1000] * 10 and torch.bincount(test.labels).tolist() == [200] * 10


def test_shapes_are_the_same_in_every_run_and_test_differs_from_train():
    (train, _, test, _), (again, *_) = load_shapes(8), load_shapes(8)
    assert torch.equal(train.images, again.images)
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in test.images)
    # Another seed splits the same images in another way, so that metrics of runs with other seeds compare.
    first, second = (load_splits("shapes", None, 8, seed) for seed in (0, 1))
    assert not torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)


def test_shapes_are_anti_aliased_at_their_true_size():
    """The painted area of a circle is pi r^2 at every resolution: the edge pixels carry their fraction of it."""
    areas = []
    for size in (16, 32, 128):
        images = draw_shapes(np.zeros(50, int), size, np.random.default_rng(0)).double()
        contrast = (images - images[:, :, :1, :1]).abs().sum(1)  # to the ground, which the corner shows
        edge = contrast / contrast.amax((1, 2), keepdim=True)
        assert ((edge > 0.1) & (edge < 0.9)).flatten(1).any(1).all()
        areas.append((contrast.sum((1, 2)) / contrast.amax((1, 2)) / size**2).numpy())
    assert np.abs(areas[0] / areas[2] - 1).max() < 0.1
    assert np.abs(areas[1] / areas[2] - 1).max() < 0.05


@pytest.mark.parametrize("size", [16, 24])
def test_the_template_classifier_knows_fresh_shapes(size):
    labels = np.arange(300) % 10
    images = draw_shapes(labels, size, np.random.default_rng(123))
    classifier = TemplateClassifier(size)
    assert classifier.accuracy(images, torch.from_numpy(labels)) >= 0.98
    noise = torch.randint(0, 256, (300, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert classifier.accuracy(noise, torch.from_numpy(labels)) < 0.3


def test_a_mirrored_moon_is_no_moon_and_shapes_are_not_mirrored():
    labels = np.arange(200) % 10
    images = draw_shapes(labels, 16, np.random.default_rng(123))
    told = TemplateClassifier(16).classify(images.flip(-1))
    moon = torch.from_numpy(labels == SHAPES.index("moon"))
    assert (told == torch.from_numpy(labels))[~moon].float().mean() >= 0.98
    assert (told == SHAPES.index("moon"))[moon].sum() == 0
    assert [name for name, data in DATASETS.items() if not data.flip] == ["shapes"]


@pytest.mark.parametrize(
    "name, x, y, distance",
    [
        ("circle", 0.3, 0.4, -0.4),
        ("square", 0.75, 0.2, 0),
        ("triangle", 0, -1, 0),  # a corner, at the top
        ("triangle", 0, 0.5, 0),  # the middle of the side below
        ("diamond", 0.6, 0, 0),
        ("plus", 0.95, 0, 0),
        ("cross", 0.5**0.5, 0.5**0.5, 0),
        ("ring", 0, 0.75, -0.2),
        ("star", 0, -1, 0),
        ("moon", -0.9, 0, 0),
        ("moon", 0.5, 0, 0.8),  # the centre of what is cut off, on the right
        ("stripes", 0, 0.7, -0.18),
    ],
)
def test_distances_of_points_to_the_outlines(name, x, y, distance):
    assert DISTANCES[name](np.array([x]), np.array([y])) == pytest.approx(distance, abs=1e-12)
