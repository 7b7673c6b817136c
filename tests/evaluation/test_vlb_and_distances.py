"""Losses, the variational bound, and distances between sets of features: closed forms and invariances (2.2 e)."""

import math

import pytest
import torch

from ex2.data.images import ImageSet, to_model_range
from ex2.data.loader import make_loader
from ex2.evaluation import vlb
from ex2.evaluation.distances import fraction_inside, frechet_distance, kernel_distance, nearest, precision_recall
from ex2.evaluation.evaluate import IdealDenoiser
from ex2.evaluation.vlb import (
    bits_per_dim,
    decoder_terms,
    discretised_log_likelihood,
    prior_term,
    timestep_strata,
    transition_terms,
)
from ex2_diffusion import SCHEDULES, Diffusion
from ex2_train import loss_over_timesteps


def images_of(pixels):
    """An `ImageSet` from uint8 pixels (N, 3, H, W)."""
    return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.long))


def random_pixels(count, size=4, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def normal(count, width, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short():
    return Diffusion(40, SCHEDULES["cosine"], 4, "cpu")


def continuous_log_likelihood(x, mean, sigma):
    """Elementwise log density of N(mean, sigma^2) at x."""
    return -0.5 * ((x - mean) / sigma).square() - math.log(sigma) - 0.5 * math.log(2 * math.pi)


# ------------------------------------------------------------------ losses


def test_x_zero_errors_of_an_oracle_and_of_a_guess(short):
    pixels = random_pixels(12)
    loader = make_loader(images_of(pixels), 5, "cpu")
    truth = to_model_range(pixels)

    class Oracle:
        """Knows the images, which come in order, a batch at every time."""

        def __init__(self):
            self.calls = 0

        def __call__(self, x, t):
            first = self.calls // 3 * 5
            self.calls += 1
            return short.predict_eps(x, t, truth[first : first + len(x)])

    known = loss_over_timesteps(Oracle(), loader, short, [0, 20, 39])
    assert known["l2"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert known["x_zero_l2"] == pytest.approx([0, 0, 0], abs=1e-5)
    grey = loss_over_timesteps(lambda x, t: short.predict_eps(x, t, torch.zeros_like(x)), loader, short, [0, 39])
    assert grey["x_zero_l2"] == pytest.approx([truth.square().mean().item()] * 2, rel=1e-4)
    assert grey["x_zero_l1"] == pytest.approx([truth.abs().mean().item()] * 2, rel=1e-4)


def test_x_zero_estimates_are_clamped(short):
    loader = make_loader(images_of(random_pixels(12)), 12, "cpu")
    far_off = loss_over_timesteps(lambda x, t: -100 * x, loader, short, [39])
    assert far_off["x_zero_l1"][0] <= 2 and far_off["l1"][0] > 50


@pytest.mark.parametrize("unconditional, seen", [(False, {0, 1}), (True, {2})])
def test_losses_without_class_use_the_null_label(short, unconditional, seen):
    labels = set()

    def model(x, t, classes):
        labels.update(classes.tolist())
        return x

    model.class_free_guidance, model.null_class = True, 2
    dataset = ImageSet(random_pixels(6), torch.arange(6) % 2)
    loss_over_timesteps(model, make_loader(dataset, 4, "cpu"), short, [0], unconditional=unconditional)
    assert labels == seen


# ------------------------------------------------------------------ the optimal of the loss


def test_the_optimal_denoiser_of_two_images_is_a_tanh(short):
    """x_0 = +-a: the posterior mean is a tanh(sqrt(alphas_bar) a x_t / (1 - alphas_bar)), summed over the pixels."""
    pixels = torch.stack((torch.full((3, 4, 4), 191), torch.full((3, 4, 4), 64))).byte()
    a = to_model_range(pixels).double()[0]
    assert torch.allclose(a, -to_model_range(pixels).double()[1])
    x_t = 0.3 * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for time in (5, 20, 39):
        t = torch.full((6,), time)
        abar = short.alphas_bar[time].double()
        mean = a * torch.tanh(abar.sqrt() / (1 - abar) * (a * x_t.double()).flatten(1).sum(1)).view(-1, 1, 1, 1)
        expected = (x_t.double() - abar.sqrt() * mean) / (1 - abar).sqrt()
        assert torch.allclose(IdealDenoiser(short, pixels)(x_t, t).double(), expected, atol=1e-5)


def test_an_only_image_is_known_at_every_time(short):
    pixels = random_pixels(1)
    loader = make_loader(images_of(pixels), 1, "cpu")
    assert loss_over_timesteps(IdealDenoiser(short, pixels), loader, short, [0, 20, 39])["l2"] == pytest.approx(
        [0, 0, 0], abs=1e-9
    )


def test_no_predictor_is_below_the_optimal_and_a_class_lowers_it(short):
    pixels, labels = random_pixels(1500) // 16 + 120, torch.arange(1500) % 2
    pixels[labels == 1] += 8
    loader, times = make_loader(ImageSet(pixels, labels), 1500, "cpu"), [0, 20, 30, 39]
    optimal = loss_over_timesteps(IdealDenoiser(short, pixels), loader, short, times)["l2"]
    with_class = loss_over_timesteps(IdealDenoiser(short, pixels, labels), loader, short, times)["l2"]

    def gaussian(x, t):  # the best linear predictor
        mean, variance = to_model_range(pixels).mean(0), to_model_range(pixels).var(0)
        abar = short.alphas_bar[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * variance + 1 - abar)

    linear = loss_over_timesteps(gaussian, loader, short, times)["l2"]
    assert all(a < b for a, b in zip(optimal[1:3], linear[1:3])) and optimal[3] <= linear[3] * 1.01
    assert all(a <= b * 1.001 for a, b in zip(with_class, optimal)) and with_class[2] < 0.99 * optimal[2]


# ------------------------------------------------------------------ the variational bound


@pytest.mark.parametrize(
    "variance, s, nats",
    [
        ("beta", 1.0, 1.41893853),
        ("beta", 0.5, 0.72688361),
        ("beta_tilde", 1.0, 1.99753338),
        ("beta_tilde", 0.5, 1.29571728),
    ],
)
def test_bound_of_gaussian_data_in_closed_form(linear, gaussian, monkeypatch, variance, s, nats):
    monkeypatch.setattr(vlb, "discretised_log_likelihood", continuous_log_likelihood)
    # Every term is quadratic in (x_zero, eps), and these four pixels have the moments of N(0, s^2) and N(0, 1).
    times = torch.arange(1000)
    x_zero = s * torch.tensor([1.0, 1, -1, -1]).reshape(1, 1, 2, 2).repeat(1000, 1, 1, 1)
    eps = torch.tensor([1.0, -1, 1, -1]).reshape(1, 1, 2, 2).repeat(1000, 1, 1, 1)
    x_t = linear.q_sample(x_zero, times, eps)
    estimate = linear.predict_x_zero(x_t, times, gaussian(linear, s)(x_t, times))
    total = prior_term(linear, x_zero[:1]).item()
    total += decoder_terms(linear, x_zero[:1], estimate[:1])[variance].item()
    total += transition_terms(linear, x_zero[1:], estimate[1:], times[1:])[variance].sum().item()
    assert total == pytest.approx(nats, abs=1e-4)


def test_the_optimal_denoiser_has_the_smallest_bound(linear, gaussian):
    times = torch.arange(1, 1000)
    x_zero = 0.5 * torch.tensor([1.0, 1, -1, -1]).reshape(1, 1, 2, 2).repeat(999, 1, 1, 1)
    x_t = linear.q_sample(x_zero, times, torch.tensor([1.0, -1, 1, -1]).reshape(1, 1, 2, 2).repeat(999, 1, 1, 1))
    sums = {}
    for s in (0.4, 0.5, 0.6):
        estimate = linear.predict_x_zero(x_t, times, gaussian(linear, s)(x_t, times))
        sums[s] = {name: term.sum().item() for name, term in transition_terms(linear, x_zero, estimate, times).items()}
    for name in ("beta", "beta_tilde"):
        assert sums[0.5][name] < min(sums[0.4][name], sums[0.6][name])


def test_prior_term_of_the_linear_schedule(linear):
    x_zero = torch.full((3, 1, 2, 2), math.sqrt(0.26))
    assert (prior_term(linear, x_zero) / math.log(2)).tolist() == pytest.approx([7.57e-6] * 3, rel=2e-3)


@pytest.mark.parametrize("sigma", [0.001, 0.0064, 0.01, 0.5])
@pytest.mark.parametrize("mean", [-1.3, -0.5, 0.0, 0.999, 2.0])
def test_probabilities_of_the_256_pixel_values_sum_to_one(mean, sigma):
    pixels = to_model_range(torch.arange(256, dtype=torch.uint8))
    log_probability = discretised_log_likelihood(pixels, torch.full((256,), mean), sigma)
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_decoder_keeps_its_digits_far_from_the_mean():
    # 40 deviations away the probability is about exp(-800), which no float holds.
    black_by_white = discretised_log_likelihood(torch.tensor([-1.0]), torch.tensor([1.0]), 0.05).item()
    assert black_by_white == pytest.approx(torch.special.log_ndtr(torch.tensor(-(2 - 1 / 255) / 0.05).double()).item())
    white_by_black = discretised_log_likelihood(torch.tensor([1.0]), torch.tensor([-1.0]), 0.05).item()
    assert white_by_black == pytest.approx(black_by_white)
    x, mean = to_model_range(torch.tensor([51, 153], dtype=torch.uint8)), torch.tensor([0.9, -0.7])
    mirrored = discretised_log_likelihood(-x, -mean, 0.01)
    assert discretised_log_likelihood(x, mean, 0.01).tolist() == pytest.approx(mirrored.tolist())


@pytest.mark.parametrize("timesteps, count", [(1000, 10), (1000, 999), (1000, 2000), (50, 7), (2, 3), (1, 5), (30, 1)])
def test_strata_are_a_partition_of_the_times(timesteps, count):
    strata = timestep_strata(timesteps, count)
    assert [t for stratum in strata for t in stratum] == list(range(1, timesteps))
    assert all(len(stratum) > 0 for stratum in strata) and len(strata) <= count


def test_bits_per_dim_is_the_sum_of_its_terms(short, gaussian):
    loader = make_loader(images_of(random_pixels(6)), 4, "cpu")
    report = bits_per_dim(gaussian(short, 0.5), loader, short, draws=39)
    assert report["t"] == list(range(1, 40)) and report["calls"] == 40 and report["images"] == 6
    for name in ("beta", "beta_tilde"):
        total = report["prior"] + report[name]["decoder"] + sum(report[name]["terms"])
        assert report[name]["total"] == pytest.approx(total, rel=1e-9)


def test_few_draws_estimate_the_full_sum_within_their_standard_error(short, gaussian):
    model, data = gaussian(short, 0.5), images_of(random_pixels(400))
    full = bits_per_dim(model, make_loader(data, 100, "cpu"), short, draws=39)["beta"]
    few = bits_per_dim(model, make_loader(data, 100, "cpu"), short, draws=5)["beta"]
    assert few["standard_error"] > full["standard_error"] > 0
    assert abs(few["total"] - full["total"]) < 4 * few["standard_error"]


def test_standard_error_falls_with_the_root_of_the_images(short, gaussian):
    model, loader = gaussian(short, 0.5), make_loader(images_of(random_pixels(400)), 100, "cpu")
    errors = [bits_per_dim(model, loader, short, draws=5, max_images=n)["beta"]["standard_error"] for n in (25, 400)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)
    assert bits_per_dim(model, loader, short, draws=5, max_images=1)["beta"]["standard_error"] is None


def test_bits_per_dim_do_not_depend_on_the_batch_size_or_the_global_seed(short, gaussian):
    totals = []
    for batch_size in (3, 10):
        torch.manual_seed(batch_size)
        loader = make_loader(images_of(random_pixels(10)), batch_size, "cpu")
        totals.append(bits_per_dim(gaussian(short, 0.5), loader, short, draws=5)["beta"]["total"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


@pytest.mark.parametrize("classes, expected", [(True, [0, 1, 0, 1]), (False, None)])
def test_the_bound_of_a_conditional_model_is_given_the_labels(short, classes, expected):
    seen = []

    def model(x, t, *labels):
        seen.append(labels[0].tolist() if labels else None)
        return x

    model.class_free_guidance, model.null_class = classes, 2
    dataset = ImageSet(random_pixels(4), torch.arange(4) % 2)
    bits_per_dim(model, make_loader(dataset, 4, "cpu"), short, draws=3)
    assert seen == [expected] * 4


def test_estimates_outside_the_range_of_images_are_clamped_in_the_bound(short):
    black = make_loader(images_of(torch.zeros(20, 3, 4, 4, dtype=torch.uint8)), 20, "cpu")
    exact, beyond = (
        bits_per_dim(lambda x, t, v=v: short.predict_eps(x, t, torch.full_like(x, v)), black, short, draws=39)
        for v in (-1.0, -3.0)
    )
    assert beyond["beta"]["total"] == pytest.approx(exact["beta"]["total"], abs=1e-3)


def test_random_pixels_cost_at_least_eight_bits_and_known_ones_next_to_none(linear):
    loader = make_loader(images_of(random_pixels(50)), 50, "cpu")
    # The best that a model without knowledge of the image can do is to denoise each pixel by itself.
    values = torch.arange(256) / 127.5 - 1

    def by_pixel(x, t):
        abar = linear.alphas_bar[t].reshape(-1, 1, 1, 1, 1)
        weight = (-0.5 * (x.unsqueeze(-1) - abar.sqrt() * values).square() / (1 - abar)).softmax(-1)
        return linear.predict_eps(x, t, (weight * values).sum(-1))

    bound = bits_per_dim(by_pixel, loader, linear, draws=60)["beta"]
    assert 8 - 3 * bound["standard_error"] < bound["total"] < 8.6

    black = make_loader(images_of(torch.zeros(50, 3, 4, 4, dtype=torch.uint8)), 50, "cpu")
    known = bits_per_dim(lambda x, t: linear.predict_eps(x, t, -torch.ones_like(x)), black, linear, draws=60)
    assert known["beta_tilde"]["total"] < 1.0


# ------------------------------------------------------------------ distances between sets of features


def exactly(count, mean, deviations, seed=0):
    """Features (count, D) whose sample mean and covariance are exactly `mean` and diag(deviations^2)."""
    x = normal(count, len(deviations), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return torch.as_tensor(mean, dtype=torch.float64) + x * torch.as_tensor(deviations, dtype=torch.float64)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = normal(300, 20) @ normal(20, 20, seed=1)
    assert frechet_distance(x, x) < 1e-8
    assert frechet_distance(x.float(), x.float().flip(0)) < 1e-3


def test_frechet_distance_of_diagonal_gaussians_in_closed_form():
    a = exactly(200, [0, 1, 2], [1, 2, 0.5])
    b = exactly(300, [1, 1, 0], [3, 2, 0.1], seed=1)
    # |mu_a - mu_b|^2 + sum of (sigma_a - sigma_b)^2
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 4 + 0.16, rel=1e-9)
    rotation = torch.linalg.qr(normal(3, 3, seed=2)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(9.16, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(9.16, rel=1e-9)


SPECTRUM = torch.logspace(0, -3, 24, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["normal", "far from zero", "with deviations from 1 to 0.001", "nearly always 0"])
def test_frechet_distance_is_that_of_symmetric_roots(kind):
    """tr (C_a C_b)^(1/2) by the singular values of C_a^(1/2) C_b^(1/2), as scipy's sqrtm gives it; in float64."""
    a, b = normal(300, 24), 1.2 * normal(200, 24, seed=1) + 0.1
    a, b = {
        "normal": (a, b),
        "far from zero": (a + 50, b + 50),
        "with deviations from 1 to 0.001": (SPECTRUM * a, SPECTRUM * b),  # piq's Newton iteration stops too early
        "nearly always 0": ((a - 2.5).clamp(min=0), (b - 2.5).clamp(min=0)),
    }[kind]
    roots = []
    for covariance in (torch.cov(a.T), torch.cov(b.T)):
        values, vectors = torch.linalg.eigh(covariance)
        roots.append((vectors * values.clamp(min=0).sqrt()) @ vectors.T)
    overlap = torch.linalg.matrix_norm(roots[0] @ roots[1], "nuc")
    gap = (a.mean(0) - b.mean(0)).square().sum()
    expected = (gap + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * overlap).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_copies_are_0_apart_and_inside_each_others_manifold():
    """Rounding of matrix products put 200 copies of one image outside their own, and up to half a grey level away."""
    one = (normal(1, 128) * 3).float()
    assert precision_recall(one.expand(200, -1), one.expand(200, -1)) == (1, 1)
    images = torch.randint(0, 256, (300, 3 * 32 * 32), generator=torch.Generator().manual_seed(0)).float()
    distance, index = nearest(images[:40], images.split(64))
    assert torch.equal(index, torch.arange(40)) and not distance.any()


@pytest.mark.parametrize("count", [2, 19, 20])
def test_too_few_samples_for_the_width_have_no_distance(count):
    assert frechet_distance(normal(50, 20), normal(count, 20)) is None
    assert frechet_distance(normal(count, 20), normal(50, 20)) is None
    assert frechet_distance(normal(50, 20), normal(21, 20, seed=1)) > 0


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same, spread = kernel_distance(normal(400, 8), normal(400, 8, seed=1))
    few, _ = kernel_distance(normal(40, 8), normal(40, 8, seed=1))
    shifted, _ = kernel_distance(normal(400, 8), normal(400, 8, seed=1) + 1)
    assert abs(same) < spread and abs(few) < 0.2 < shifted


def test_kernel_distance_of_two_pairs_by_hand():
    # Subsets of two of four equal points each: k(x, y) = (x y + 1)^3 for features of width 1.
    ones, twos = torch.ones(4, 1), torch.full((4, 1), 2.0)
    assert kernel_distance(ones, twos)[0] == pytest.approx(8 + 125 - 2 * 27)


def test_kernel_distance_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = kernel_distance(normal(50, 4), normal(50, 4, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert kernel_distance(normal(50, 4), normal(50, 4, seed=1)) == first


def test_precision_and_recall_of_known_sets():
    real = normal(600, 2)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    collapsed = 0.1 * normal(600, 2, seed=1)  # good, but all alike
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.2
    scattered = 5 * normal(600, 2, seed=1)  # covers everything, and much else
    precision, recall = precision_recall(real, scattered)
    assert precision < 0.3 and recall > 0.8


def test_manifold_is_made_of_balls_to_the_third_neighbour():
    line = torch.tensor([[0.0], [1], [2], [3]]).double()  # radii 3, 2, 2, 3
    points = torch.tensor([[-3.0], [-3.1], [6.0], [6.1], [1.5]]).double()
    assert fraction_inside(points, line, 3) == pytest.approx(3 / 5)


def test_nearest_over_batches_is_the_nearest_of_all():
    queries, gallery = normal(30, 5).float(), normal(200, 5, seed=1).float()
    distance, index = nearest(queries, gallery.split(33))
    all_distances = (queries[:, None] - gallery).norm(dim=-1)
    assert torch.equal(index, all_distances.argmin(1))
    assert torch.allclose(distance, all_distances.min(1).values, atol=1e-5)
