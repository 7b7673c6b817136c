import os

import pytest
import torch
from tiny import TINY, without_curves, without_evaluation

import ex2_main
from ex2.data import load, shapes
from ex2.evaluation import classifier, evaluate
from ex2_diffusion import SCHEDULES, Diffusion, extract
from ex2_model import Unet

# Models of tests are so small that threads would only wait for each other, and for those of tests beside them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


# In this order, so that two workers end together; the others are short.
LONGEST_FIRST = "samples train study job processes main check nothing_lost run classifier cuda_graphs viz facts".split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # by which pytest-xdist starts with the files of the most tests


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


class GaussianDenoiser:
    """The optimal noise prediction for data N(mu, s^2) per dimension, in closed form; with classes, one mu per class.

    eps*(x, t) = sqrt(1 - abar_t) (x - sqrt(abar_t) mu) / v_t with v_t = abar_t s^2 + 1 - abar_t.
    """

    def __init__(self, diffusor, s=1.0, mu=0.0, class_means=None):
        self.diffusor, self.s, self.mu = diffusor, s, mu
        if class_means is not None:
            self.class_means = torch.tensor([*class_means, mu])
            self.null_class = len(class_means)
        self.calls = []  # (t of the first image, batch size)

    def __call__(self, x, t, classes=None):
        self.calls.append((int(t[0]), len(x)))
        mu = self.mu if classes is None else self.class_means[classes].reshape(-1, 1, 1, 1)
        abar = extract(self.diffusor.alphas_bar, t, x.shape)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mu) / (abar * self.s**2 + 1 - abar)


@pytest.fixture(scope="session", autouse=True)
def curves_not_drawn():
    with pytest.MonkeyPatch.context() as patch:
        without_curves(patch)
        yield


@pytest.fixture(autouse=True)
def same_precision():
    """What choosing a device sets for the whole process (TensorFloat-32) ends with the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture(scope="session")
def linear():
    return Diffusion(1000, SCHEDULES["linear"], 4, "cpu")


@pytest.fixture(scope="session")
def cosine():
    return Diffusion(1000, SCHEDULES["cosine"], 4, "cpu")


@pytest.fixture
def gaussian():
    return GaussianDenoiser


@pytest.fixture(scope="module")
def small_shapes():
    """Ten times fewer images than the data set has, and samples; a classifier that trains a quarter as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SHAPES_COUNT", {"train": 1000, "test": 200})
        patch.setattr(classifier, "CLASSIFIER_EPOCHS", 2)
        patch.setattr(evaluate, "ACCURACY_SAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def splits(small_shapes):
    return load.load_splits("shapes", None, 16, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional run that was trained, and neither evaluated nor drawn."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        without_evaluation(patch)
        assert ex2_main.main([*TINY, "--results_dir", str(results), "--class_free_guidance"]) == 0
    return results / "DDPM"


@pytest.fixture
def diffusor():
    return Diffusion(50, SCHEDULES["cosine"], 8, "cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Unet(dim=8, dim_mults=(1, 2), class_free_guidance=True, num_classes=3)
