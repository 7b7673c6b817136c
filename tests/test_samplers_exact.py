"""All samplers on data with a known answer, one pixel of N(mean, deviation^2), as in docs/exact.md (2.2 b)."""

import math
import sys
from pathlib import Path

import pytest
import torch

from ex2.samplers import ADAMS_BASHFORTH, SAMPLERS
from ex2_diffusion import SCHEDULES, Diffusion

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from exact import DATA, SAMPLES, SETTINGS, STEPS, exact_noise, moments, sampled_moments  # noqa: E402

NOISE = 1 / math.sqrt(500)  # relative standard error of the difference of the deviations of twice 500 samples
LARGEST = {  # relative error of the deviation, from 15 steps on
    "ddpm": 0.29,  # too wide: sigma^2 = beta_t is the variance of the step for data of deviation 1
    "ddim": 0.19,
    "ddim, eta 1": 0.30,
    "dpmpp_2m": 0.07,
    "dpmpp_2m, eta 1": 0.13,
    "heun": 0.05,
    "ipndm": 0.04,
}


def errors(process, name, mean, deviation, steps):
    """(steps, error of the mean, relative error of the deviation) of unclamped samples."""
    model = exact_noise(process, mean, deviation)
    found = [(count, *moments(process, model, count, **SETTINGS[name])) for count in steps]
    return [(count, mu - mean, s / deviation - 1) for count, mu, s in found]


def test_every_sampler_is_in_the_table():
    assert {settings["sampler"] for settings in SETTINGS.values()} == SAMPLERS.keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_more_steps_are_not_worse_and_few_are_near(name, schedule):
    """dpmpp_2m --eta 1 was 25% too wide between 8 and 15 steps on linear, 35% on cosine, worse than with 5."""
    few = [steps for steps in STEPS if steps <= 50]
    for timesteps in (100, 1000):
        process = Diffusion(timesteps, SCHEDULES[schedule], 1, "cpu")
        for mean, deviation in DATA:
            found = errors(process, name, mean, deviation, few)
            sizes = [abs(error) for _, _, error in found]
            for i, (steps, of_mean, _) in enumerate(found):
                assert sizes[i] <= min(sizes[: i + 1]) + NOISE, (found, steps)
                assert abs(of_mean) < 0.005 or steps == 5, found
                assert sizes[i] < LARGEST[name] or steps < 15, found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_third_half_and_all_of_the_timesteps_are_right(name):
    off = {"ddpm": 0.03, "ddim": 0.04, "ddim, eta 1": 0.08}.get(name, 0.006)
    for schedule in SCHEDULES.values():
        process = Diffusion(100, schedule, 1, "cpu")
        for steps, of_mean, error in errors(process, name, 0.0, 0.5, (34, 51, 99, 100)):
            assert abs(error) < off * (2 if steps == 34 else 1) and of_mean == 0, (steps, error)


@pytest.mark.parametrize(
    "name, expected",  # those of ddpm and ddim --eta 1 were known beforehand
    list(zip(SETTINGS, (0.50075, 0.4985, 0.49611, 0.5, 0.5, 0.5, 0.5))),
)
def test_deviation_after_all_of_1000_timesteps(linear, name, expected):
    mean, deviation = moments(linear, exact_noise(linear, 0.0, 0.5), 1000, **SETTINGS[name])
    assert mean == 0 and deviation == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "schedule, name, deviations",
    [
        ("cosine", "heun", {10: 0.507}),
        ("linear", "dpmpp_2m, eta 1", {10: 0.463, 25: 0.499, 50: 0.500}),
        ("linear", "ipndm", {10: 0.515}),
        ("cosine", "ddpm", {50: 0.509}),  # the widest of 50 steps, and the narrowest
        ("cosine", "ddim, eta 1", {50: 0.474}),
    ],
)
def test_deviations_that_stand_beside_those_of_diffusers(schedule, name, deviations, request):
    """docs/other-libraries.md."""
    process = request.getfixturevalue(schedule)
    model = exact_noise(process, 0.0, 0.5)
    for steps, expected in deviations.items():
        assert moments(process, model, steps, **SETTINGS[name])[1] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m, eta 1", "ipndm"])
def test_moments_are_those_of_samples(cosine, name):
    """Where clamping changes nothing: x_zero lies within [-1, 1] but for one value in 2 million."""
    model = exact_noise(cosine, 0.0, 0.2)
    exact, drawn = (measure(cosine, model, 10, **SETTINGS[name]) for measure in (moments, sampled_moments))
    assert drawn == pytest.approx(exact, abs=4 * 0.2 / math.sqrt(SAMPLES))


# ------------------------------------------------------------------ iPNDM


def even_sigmas(count):
    """Betas of a process whose sigma / alpha is 0.1, 0.2, 0.3, ..."""
    ratios = 0.1 * torch.arange(count + 1, dtype=torch.float64)
    alphas_bar = 1 / (1 + ratios**2)
    return 1 - alphas_bar[1:] / alphas_bar[:-1]


@pytest.mark.parametrize("degree", range(4))
def test_ipndm_integrates_a_cubic_exactly_at_even_steps(degree):
    """d(x / alpha) = eps d(sigma / alpha); each step but the first `degree` has the estimates that it takes."""
    with pytest.warns(UserWarning, match="still shows the image"):
        process = Diffusion(8, even_sigmas, 1, "cpu")
    states, ratios = {}, 0.1 * torch.arange(1, 9, dtype=torch.float64)

    def model(x, t):
        return torch.full_like(x, ratios[t[0]].item() ** degree)

    for t, x, _ in process.sample_trajectory(model, 1, 1, 1, sampler="ipndm", clamp=False):
        states[t] = x.double().item() / process.sqrt_alphas_bar[t].double().item() if t >= 0 else x.double().item()
    for t in range(7 - degree, 0, -1):  # from t to t - 1
        integral = (ratios[t] ** (degree + 1) - ratios[t - 1] ** (degree + 1)) / (degree + 1)
        assert states[t] - states[t - 1] == pytest.approx(integral.item(), abs=2e-6)
    assert [sum(factors) for factors in ADAMS_BASHFORTH] == pytest.approx([1.0] * 4)
