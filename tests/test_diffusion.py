"""Schedules, forward process, loss and single reverse steps (2.2 a, c, d; 2.3)."""

import math

import pytest
import torch

import ex2_diffusion
from ex2.samplers import ddim_step
from ex2_diffusion import (
    SCHEDULES,
    Diffusion,
    cosine_beta_schedule,
    extract,
    linear_beta_schedule,
    rescale_schedule,
    sigmoid_beta_schedule,
)


def last_alpha_bar(betas):
    return torch.cumprod(1 - betas.double(), 0)[-1].item()


# ------------------------------------------------------------------ schedules: values of DESIGN.md


def test_cosine_values():
    betas = cosine_beta_schedule(1000)
    alphas_bar = torch.cumprod(1 - betas, 0)
    assert betas[0].item() == pytest.approx(4.1284e-5, rel=1e-4)
    assert alphas_bar[0].item() == pytest.approx(0.99995872, abs=1e-8)
    assert alphas_bar[499].item() == pytest.approx(0.49384359, abs=1e-8)
    assert betas[998].item() == pytest.approx(0.75, abs=1e-3)
    assert betas[999].item() == 0.999
    assert (betas == 0.999).sum() == 1
    assert alphas_bar[999].item() == pytest.approx(2.42877e-9, rel=1e-5)


def test_sigmoid_values():
    betas = sigmoid_beta_schedule(1e-4, 0.02, 1000)
    assert betas[0].item() == pytest.approx(1.49205e-4, rel=1e-5)
    assert betas[-1].item() == pytest.approx(1.995079e-2, rel=1e-6)
    assert last_alpha_bar(betas) == pytest.approx(3.96818e-5, rel=1e-5)


@pytest.mark.parametrize(
    "timesteps, expected", [(50, 0.60295), (100, 0.36356), (300, 0.048058), (500, 0.0063527), (1000, 4.03583e-5)]
)
def test_linear_alpha_bar(timesteps, expected):
    assert last_alpha_bar(linear_beta_schedule(1e-4, 0.02, timesteps)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("timesteps, expected", [(50, 7.745e-6), (100, 2.039e-5), (300, 3.426e-5)])
def test_named_linear_is_rescaled(timesteps, expected):
    assert last_alpha_bar(SCHEDULES["linear"](timesteps)) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("limit", [1.0, 6.0])
def test_sigmoid_s_limit_sets_the_range(limit):
    betas = sigmoid_beta_schedule(0.0, 1.0, 101, s_limit=limit)
    assert betas[0].item() == pytest.approx(1 / (1 + math.exp(limit)))
    assert betas[50].item() == pytest.approx(0.5)
    assert betas[-1].item() == pytest.approx(1 / (1 + math.exp(-limit)))


@pytest.mark.parametrize("timesteps", [1, 2, 10, 20, 21, 100, 999, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_give_t_betas_between_0_and_1_or_say_why_not(name, timesteps):
    if name != "cosine" and timesteps <= 20:
        with pytest.raises(ValueError, match=f"{timesteps} timesteps are too few"):
            SCHEDULES[name](timesteps)
        return
    betas = SCHEDULES[name](timesteps)
    assert betas.shape == (timesteps,)
    assert ((betas > 0) & (betas < 1)).all()
    assert (betas.diff() >= 0).all()


def test_rescaled_is_the_published_schedule_at_1000():
    assert torch.equal(rescale_schedule(linear_beta_schedule, 1000), linear_beta_schedule(1e-4, 0.02, 1000))


@pytest.mark.parametrize("timesteps", [0, -1])
@pytest.mark.parametrize(
    "schedule",
    [
        *SCHEDULES.values(),
        lambda n: linear_beta_schedule(1e-4, 0.02, n),
        lambda n: sigmoid_beta_schedule(1e-4, 0.02, n),
    ],
)
def test_no_timesteps_are_refused(schedule, timesteps):
    with pytest.raises(ValueError, match="timesteps must be at least 1"):
        schedule(timesteps)


@pytest.mark.parametrize("beta_start, beta_end", [(0.0, 0.02), (1e-4, 1.0), (-0.1, 0.5)])
def test_impossible_beta_ranges_are_refused(beta_start, beta_end):
    with pytest.raises(ValueError, match="between 0 and 1"):
        linear_beta_schedule(beta_start, beta_end, 10)


@pytest.mark.parametrize(
    "schedule",
    [lambda n: torch.linspace(0, 0.02, n), lambda n: torch.linspace(0.1, 1.0, n), lambda n: torch.ones(3) / 2],
)
def test_impossible_betas_are_refused(schedule):
    with pytest.raises(ValueError, match="between 0 and 1|shape"):
        Diffusion(10, schedule, 8, "cpu")


def test_short_linear_schedule_warns_that_noise_is_left_out():
    with pytest.warns(UserWarning, match=r"alphas_bar ends at 0\.364"):
        Diffusion(100, lambda n: linear_beta_schedule(1e-4, 0.02, n), 8, "cpu")


# ------------------------------------------------------------------ tables


def test_tables_are_float32_cumprods_of_the_betas_in_use(cosine):
    betas = cosine_beta_schedule(1000)
    tables = [v for name, v in vars(cosine).items() if isinstance(v, torch.Tensor) and name != "model_timesteps"]
    assert all(table.dtype == torch.float32 for table in tables)
    torch.testing.assert_close(cosine.alphas_bar, torch.cumprod(1 - betas, 0).float(), rtol=0, atol=0)
    assert (cosine.sqrt_alphas_bar**2 + cosine.sqrt_one_minus_alphas_bar**2 - 1).abs().max() < 1e-6


def test_posterior_variance_values(linear):
    assert linear.posterior_variance[0] == 0
    assert linear.posterior_variance[1].item() == pytest.approx(5.45319e-5, rel=1e-5)


def test_extract_picks_per_sample():
    table = torch.arange(10.0)
    out = extract(table, torch.tensor([7, 0, 3]), (3, 3, 8, 8))
    assert out.shape == (3, 1, 1, 1)
    assert out.flatten().tolist() == [7, 0, 3]


def test_no_device_named_works_where_there_is_no_cuda():
    diffusor = Diffusion(1000, SCHEDULES["linear"], 8)
    assert diffusor.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_tables_follow_the_device(linear):
    moved = Diffusion(1000, SCHEDULES["linear"], 4, "cpu").to("meta")  # the one other device every machine has
    assert moved.device.type == "meta"
    t = torch.zeros(2, dtype=torch.long, device="meta")
    assert moved.q_sample(torch.zeros(2, 3, 4, 4, device="meta"), t).device.type == "meta"


# ------------------------------------------------------------------ 2.2 c: forward process


@pytest.mark.parametrize("t", [0, 10, 300, 999])
def test_q_sample_of_zero_is_gaussian_noise_of_variance_one_minus_alpha_bar(linear, t):
    torch.manual_seed(0)
    x = linear.q_sample(torch.zeros(64, 3, 64, 64), torch.full((64,), t))
    variance = (1 - linear.alphas_bar[t]).item()
    assert x.mean().abs().item() < 0.01 * math.sqrt(variance)
    assert x.var().item() == pytest.approx(variance, rel=0.02)
    assert (x**4).mean().item() / x.var().item() ** 2 == pytest.approx(3, abs=0.06)


def test_chain_of_single_steps_has_the_closed_forms_mean_and_variance(linear):
    x_zero = torch.full((64, 3, 16, 16), 0.8)
    for t, x, _ in linear.forward_trajectory(x_zero, torch.Generator().manual_seed(0)):
        if t in (0, 99, 500):
            assert x.mean().item() == pytest.approx(0.8 * linear.sqrt_alphas_bar[t].item(), abs=0.02)
            assert x.var().item() == pytest.approx(1 - linear.alphas_bar[t].item(), rel=0.02)
    assert t == 999


def test_x_zero_and_eps_are_recovered_from_x_t(linear):
    x_zero, eps, t = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4), torch.tensor([0, 10, 200, 600])
    x_t = linear.q_sample(x_zero, t, eps)
    torch.testing.assert_close(linear.predict_x_zero(x_t, t, eps), x_zero, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.predict_eps(x_t, t, x_zero), eps, atol=1e-4, rtol=1e-4)


def test_a_unit_test_written_against_the_skeleton_runs_under_its_name():
    """`conftest.py` of the top folder gives our modules the handed-out names."""
    from ex02_diffusion import Diffusion, linear_beta_schedule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    g = torch.Generator().manual_seed(0)
    x_zero, noise = torch.randn(8, 3, 32, 32, generator=g), torch.randn(8, 3, 32, 32, generator=g)
    t = torch.randint(0, 100, (8,), generator=g)
    abar = torch.cumprod(1 - torch.linspace(0.001, 0.02, 100), 0)[t].reshape(-1, 1, 1, 1)
    diffusor = Diffusion(100, lambda n: linear_beta_schedule(0.001, 0.02, n), img_size=32)
    output = diffusor.q_sample(x_zero=x_zero.to(device), t=t.to(device), noise=noise.to(device))
    torch.testing.assert_close(abar.sqrt() * x_zero + (1 - abar).sqrt() * noise, output.cpu(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ 2.2 d: loss


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_zero_predictor_scores_an_l2_loss_of_one(linear, batch_size):
    torch.manual_seed(batch_size)
    x_zero, t = torch.rand(batch_size, 3, 128, 128) * 2 - 1, torch.randint(0, 1000, (batch_size,))
    loss = linear.p_losses(lambda x, t: torch.zeros_like(x), x_zero, t, loss_type="l2")
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1, abs=0.02)
    l1 = linear.p_losses(lambda x, t: torch.zeros_like(x), x_zero, t)
    assert l1.item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)  # E|eps|


def test_unknown_loss_is_named(linear):
    with pytest.raises(ValueError, match="'huber'"):
        linear.p_losses(lambda x, t: x, torch.zeros(1, 3, 4, 4), torch.tensor([0]), loss_type="huber")


@pytest.mark.parametrize(
    "images, message",
    [(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"), (torch.full((1, 3, 4, 4), 255.0), r"\|x\| up to 255")],
)
def test_images_outside_the_range_are_refused(linear, images, message):
    with pytest.raises(ValueError, match=message):
        linear.p_losses(lambda x, t: x, images, torch.tensor([0]))


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_loss_of_the_optimal_denoiser_is_its_closed_form(linear, gaussian, t):
    torch.manual_seed(1)
    s = 0.5  # of uniform data on [-0.866, 0.866]: the optimal *linear* predictor's error depends on the variance alone
    x_zero = (torch.rand(256, 3, 32, 32) * 2 - 1) * s * math.sqrt(3)
    loss = linear.p_losses(gaussian(linear, s), x_zero, torch.full((256,), t), loss_type="l2").item()
    abar = linear.alphas_bar[t].item()
    assert loss == pytest.approx(abar * s**2 / (abar * s**2 + 1 - abar), rel=0.02)


@pytest.mark.parametrize("s, expected", [(1.0, 0.275513), (0.5, 0.173053)])
def test_mean_optimal_loss_over_t(linear, s, expected):
    abar = linear.alphas_bar.double()
    assert (abar * s**2 / (abar * s**2 + 1 - abar)).mean().item() == pytest.approx(expected, abs=2e-6)


# ------------------------------------------------------------------ 2.2 d: reverse steps


def posterior_mean(diffusor, x_zero, x_t, t):
    """Of q(x_{t-1} | x_t, x_zero); Ho et al. 2020, Eq. 7."""
    alphas_bar = torch.tensor(diffusor.alphas_bar_exact, dtype=torch.float64)
    before = torch.cat((torch.ones(1), alphas_bar[:-1]))
    of_x_t = ((alphas_bar / before).sqrt() * (1 - before) / (1 - alphas_bar)).to(x_t.dtype)
    return extract(diffusor.posterior_mean_x_zero, t, x_t.shape) * x_zero + extract(of_x_t, t, x_t.shape) * x_t


@pytest.mark.parametrize("name", SCHEDULES)
def test_eq_8_is_the_posterior_mean_of_the_predicted_image(name):
    diffusor = Diffusion(1000, SCHEDULES[name], 4, "cpu")
    t = torch.arange(1000)
    x, eps = torch.randn(1000, 3, 4, 4, dtype=torch.float64), torch.randn(1000, 3, 4, 4, dtype=torch.float64)
    for key, table in vars(diffusor).items():  # exact tables, as the statement is about equations
        if isinstance(table, torch.Tensor) and table.is_floating_point():
            setattr(diffusor, key, table.double())
    mean = posterior_mean(diffusor, diffusor.predict_x_zero(x, t, eps), x, t)
    step = diffusor.ddpm_step(x, t, eps, torch.zeros_like(x))
    scale = 1 + step.abs().amax(dim=(1, 2, 3))
    assert ((step - mean).abs().amax(dim=(1, 2, 3)) / scale).max() < 1e-5


def test_ddim_with_eta_one_is_ancestral_sampling_with_the_posterior_variance(linear):
    t = torch.arange(1000)
    x, eps, z = (torch.randn(1000, 3, 4, 4) for _ in range(3))
    x_zero = linear.predict_x_zero(x, t, eps)
    mean, variance = posterior_mean(linear, x_zero, x, t), extract(linear.posterior_variance, t, x.shape)
    scale = 1 + x_zero.abs().amax(dim=(1, 2, 3), keepdim=True)
    steps = torch.cat([ddim_step(linear, i, eps[[i]], x_zero[[i]], lambda i=i: z[[i]], eta=1.0) for i in range(1000)])
    assert ((steps - mean - variance.sqrt() * z).abs() / scale).max() < 2e-5


def test_clamped_noise_belongs_to_the_clamped_image(cosine):
    x, eps, t = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), torch.tensor([10, 400, 900, 990])
    clamped = cosine.clamp_eps(x, t, eps)
    x_zero = cosine.predict_x_zero(x, t, eps).clamp(-1, 1)
    torch.testing.assert_close(cosine.q_sample(x_zero, t, clamped), x)
    inside = cosine.q_sample(torch.rand(4, 3, 4, 4) * 1.8 - 0.9, t, eps)
    torch.testing.assert_close(cosine.clamp_eps(inside, t, eps), eps, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("s, expected", [(1.0, 0.99995), (0.5, 0.50075)])
def test_final_deviation_of_ancestral_sampling_is_exact(linear, gaussian, s, expected):
    """Every step is linear in x and z, so the variance can be followed through all of them without sampling."""
    model, variance = gaussian(linear, s), 1.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for i in reversed(range(1000)):
        t = torch.tensor([i])
        a = linear.ddpm_step(one, t, model(one, t), zero).item()
        b = linear.ddpm_step(zero, t, zero, one).item() if i > 0 else 0.0
        variance = a**2 * variance + b**2
    assert math.sqrt(variance) == pytest.approx(expected, abs=2e-5)


def test_final_deviation_with_the_posterior_variance_is_exact(linear, gaussian):
    model, variance = gaussian(linear, 0.5), 1.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for i in reversed(range(1000)):
        t = torch.tensor([i])
        eps = model(one, t)
        a = ddim_step(linear, i, eps, linear.predict_x_zero(one, t, eps), lambda: zero, eta=1.0).item()
        b = ddim_step(linear, i, zero, zero, lambda: one, eta=1.0).item()
        variance = a**2 * variance + b**2
    assert math.sqrt(variance) == pytest.approx(0.49611, abs=2e-5)


@pytest.mark.parametrize("s, expected", [(1.0, 1.41893853), (0.5, 0.72688361)])
def test_variational_bound_of_the_optimal_denoiser(linear, s, expected):
    """Ho et al. 2020, Eq. 5, in nats per dimension with sigma^2 = beta, from the tables and the closed-form loss."""
    table = {k: v.double() for k, v in vars(linear).items() if isinstance(v, torch.Tensor)}
    abar, beta = table["alphas_bar"], table["betas"]
    eps_error = abar * s**2 / (abar * s**2 + 1 - abar)
    prior = 0.5 * (abar[-1] * s**2 - abar[-1] - torch.log(1 - abar[-1]))
    mean_error = (table["sqrt_recip_alphas"] * table["eps_factor"]) ** 2 * eps_error
    ratio = table["posterior_variance"][1:] / beta[1:]
    steps = 0.5 * (ratio - 1 - ratio.log() + mean_error[1:] / beta[1:])
    decoder = 0.5 * torch.log(2 * math.pi * beta[0]) + 0.5 * mean_error[0] / beta[0]
    bound = (prior + steps.sum() + decoder).item()
    assert bound == pytest.approx(expected, abs=2e-5)
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)  # 0.72579135 at s = 0.5: what no bound can undercut
    assert entropy - 2e-5 < bound < entropy + 2e-3


def test_no_float64_reaches_the_device(linear):
    """MPS has none: with default tensors every result is float32."""
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([3, 4])
    assert linear.q_sample(x, t).dtype == torch.float32
    assert linear.p_sample(lambda x, t: x, x, t, 3).dtype == torch.float32
    assert linear.respace(10).betas.dtype == torch.float32


def test_module_exports_the_handed_out_names():
    for name in ("linear_beta_schedule", "cosine_beta_schedule", "sigmoid_beta_schedule", "extract", "Diffusion"):
        assert hasattr(ex2_diffusion, name)


# ------------------------------------------------------------------ min-SNR


def test_min_snr_weights_are_one_where_noise_prevails_and_gamma_over_snr_elsewhere(linear):
    t = torch.arange(1000)
    snr = linear.alphas_bar / (1 - linear.alphas_bar)
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(linear.min_snr_weights(t, 5.0), expected, rtol=1e-3, atol=0)
    assert (linear.min_snr_weights(t, 5.0)[snr < 5] == 1).all()


def test_min_snr_loss_is_the_mean_of_weighted_errors_and_eq_9_for_a_large_gamma(linear):
    g = torch.Generator().manual_seed(0)
    x_zero, noise = torch.rand(6, 3, 4, 4, generator=g) * 2 - 1, torch.randn(6, 3, 4, 4, generator=g)
    t = torch.tensor([0, 10, 100, 300, 600, 999])
    for loss_type, error in (("l2", noise.square()), ("l1", noise.abs())):
        weighted = linear.p_losses(lambda x, t: torch.zeros_like(x), x_zero, t, noise, loss_type, min_snr=2.0)
        assert weighted.item() == pytest.approx((linear.min_snr_weights(t, 2.0) * error.mean((1, 2, 3))).mean().item())
        free = linear.p_losses(lambda x, t: torch.zeros_like(x), x_zero, t, noise, loss_type, min_snr=1e9)
        assert free.item() == pytest.approx(error.mean().item())
        assert weighted < free
