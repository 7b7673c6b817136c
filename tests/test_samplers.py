"""Samplers, trajectories and classifier-free guidance (2.2 b, 2.4)."""

import gc
import math
import weakref

import pytest
import torch

import ex2_diffusion
from ex2.noise import ImageNoise, sample_in_batches
from ex2.samplers import SAMPLERS, ddim_step
from ex2_diffusion import (
    SCHEDULES,
    Diffusion,
    extract,
    guided_eps,
    linear_beta_schedule,
    subsample_timesteps,
    thin_trajectory,
)
from ex2_model import Unet


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return Unet(dim=8, dim_mults=(1, 2), class_free_guidance=True, num_classes=10).eval()


@pytest.fixture(scope="module")
def short():
    return Diffusion(50, SCHEDULES["cosine"], 8, "cpu")


# ------------------------------------------------------------------ which steps are taken


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_every_time_is_visited_once_from_t_minus_1_to_0(linear, gaussian, sampler):
    model = gaussian(linear)
    linear.sample(model, 4, batch_size=2, sampler=sampler)
    assert [t for t, _ in model.calls] == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
def test_fewer_steps_keep_both_ends_and_the_signal_of_every_kept_time(linear, gaussian, steps):
    model = gaussian(linear)
    linear.sample(model, 4, batch_size=1, steps=steps)
    times = [t for t, _ in model.calls]
    assert len(times) == len(set(times)) == steps
    assert times[0] == 999 and times == sorted(times, reverse=True)
    assert times[-1] == 0 or steps == 1
    spaced = linear.respace(steps)
    torch.testing.assert_close(spaced.alphas_bar, linear.alphas_bar[times[::-1]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("timesteps", [1, 2, 30, 1000])
def test_visited_times_are_distinct_and_closer_near_zero_for_any_number_of_steps(timesteps):
    for steps in range(1, timesteps + 1, 1 + timesteps // 50):
        times = subsample_timesteps(timesteps, steps)
        gaps = times.diff()
        assert len(times) == steps and times[-1] == timesteps - 1 and (times[0] == 0 or steps == 1)
        assert (gaps > 0).all() and (gaps.diff() >= -1).all()  # but for rounding they only widen
    assert subsample_timesteps(1000, 5).tolist() == [0, 125, 353, 649, 999]  # 999 (k / 4)^1.5


def test_heun_calls_the_model_at_both_ends_of_every_step_but_the_last(linear, gaussian):
    model = gaussian(linear)
    visited = [t for t, _, _ in linear.sample_trajectory(model, 4, 2, sampler="heun", steps=4)]
    assert visited == [999, 544, 192, 0, -1]
    assert [t for t, _ in model.calls] == [999, 544, 544, 192, 192, 0, 0]


# ------------------------------------------------------------------ solvers of second order


@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_first_order_dpm_solver_is_ddim(schedule, eta):
    process = Diffusion(1000, SCHEDULES[schedule], 4, "cpu").respace(20)
    g = torch.Generator().manual_seed(0)
    x, x_zero = torch.randn(20, 3, 4, 4, generator=g), torch.rand(20, 3, 4, 4, generator=g) * 2 - 1
    t = torch.arange(20)
    z = torch.randn(x.shape, generator=g)
    eps = process.predict_eps(x, t, x_zero)
    ddim = torch.cat([ddim_step(process, i, eps[[i]], x_zero[[i]], lambda i=i: z[[i]], eta) for i in range(20)])
    # Lu et al. 2022, Eq. 9: with v the variance of the fresh noise, what is left of x_t shrinks by this factor.
    abar, before, v = (
        extract(table.double(), t, x.shape)
        for table in (process.alphas_bar, process.alphas_bar_prev, eta**2 * process.posterior_variance)
    )
    shrink = ((1 - before - v).clamp(min=0) / (1 - abar)).sqrt()
    step = shrink * x + (before.sqrt() - abar.sqrt() * shrink) * x_zero + v.sqrt() * z
    torch.testing.assert_close(ddim.double(), step, atol=2e-5, rtol=1e-4)


def exact_solution(process, x, s, mu):
    """x at t = 0 on the probability-flow ODE of N(mu, s^2), from x at the last time: its z-score stays."""
    alphas_bar = [process.alphas_bar_exact[k] for k in (0, -1)]
    means = [math.sqrt(a) * mu for a in alphas_bar]
    deviations = [math.sqrt(a * s**2 + 1 - a) for a in alphas_bar]
    return means[0] + deviations[0] / deviations[1] * (x - means[1])


def even_angles(count):
    """Betas of a process whose signal is cos(angle), at angles that are evenly spaced."""
    alphas_bar = torch.cos(torch.linspace(0.02, 1.5, count, dtype=torch.float64)) ** 2
    return 1 - alphas_bar / torch.cat((torch.ones(1), alphas_bar[:-1]))


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2), ("ipndm", 2)])
def test_solvers_converge_with_their_order(gaussian, sampler, order, monkeypatch):
    """Twice the steps, 2^order times less error, at even times; 2^12 + 1, so that halves of steps are whole times.

    iPNDM's factors are those of order 4 for even steps in sigma / alpha, which these aren't.
    """
    monkeypatch.setattr(ex2_diffusion, "SPACING", 1.0)
    diffusor = Diffusion(2**12 + 1, even_angles, 4, "cpu")
    model = gaussian(diffusor, s=0.5, mu=0.3)
    errors = []
    for steps in (65, 129):
        g = torch.Generator().manual_seed(0)
        path = list(diffusor.sample_trajectory(model, 4, 8, sampler=sampler, steps=steps, clamp=False, generator=g))
        assert [t for t, _, _ in path[:1] + path[-2:]] == [2**12, 0, -1]
        errors.append((path[-2][1] - exact_solution(diffusor, path[0][1], 0.5, 0.3)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
    assert errors[1] < {"ddim": 0.03, "dpmpp_2m": 5e-4, "heun": 2e-4, "ipndm": 3e-5}[sampler]


def error_of(process, model, **settings):
    """Largest error at t = 0 of samples of N(0, 0.5^2)."""
    g = torch.Generator().manual_seed(0)
    path = list(process.sample_trajectory(model, 4, 8, clamp=False, generator=g, **settings))
    return (path[-2][1] - exact_solution(process, path[0][1], 0.5, 0.0)).abs().max().item()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_times_that_are_closer_near_zero_lessen_the_error_of_few_steps(gaussian, schedule, monkeypatch):
    process = Diffusion(1000, SCHEDULES[schedule], 4, "cpu")
    model = gaussian(process, s=0.5)
    error = error_of(process, model, sampler="dpmpp_2m", steps=25)
    monkeypatch.setattr(ex2_diffusion, "SPACING", 1.0)
    assert error < error_of(process, model, sampler="dpmpp_2m", steps=25) / 1.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_second_order_with_fresh_noise_comes_nearer_to_the_data_in_few_steps(gaussian, schedule):
    process = Diffusion(1000, SCHEDULES[schedule], 4, "cpu")
    error = {}
    for sampler in ("ddim", "dpmpp_2m"):
        settings = {"sampler": sampler, "eta": 1.0, "steps": 50, "generator": torch.Generator().manual_seed(0)}
        x = process.sample(gaussian(process, s=0.5), 4, 2048, 1, clamp=False, **settings)
        error[sampler] = abs(x.std().item() - 0.5)
    assert error["dpmpp_2m"] < 0.6 * error["ddim"]
    assert error["dpmpp_2m"] < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_model_that_knows_the_image_leads_to_it_in_any_number_of_steps(cosine, sampler, steps):
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)

    def knows(x, t):
        abar = extract(cosine.alphas_bar, t, x.shape)
        return (x - abar.sqrt() * image) / (1 - abar).sqrt()

    x = cosine.sample(knows, 4, 2, sampler=sampler, steps=steps, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, image.expand(2, -1, -1, -1), atol=0.03 if sampler == "ddpm" else 2e-3, rtol=0)


def test_heun_needs_fewer_network_calls_than_ddim_for_the_same_error(cosine, gaussian):
    model = gaussian(cosine, s=0.5)  # 25 calls each
    error = error_of(cosine, model, sampler="heun", steps=13)
    assert error < error_of(cosine, model, sampler="ddim", steps=25) / 3


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(linear, gaussian, steps):
    with pytest.raises(ValueError, match=f"1 .. 1000.*got {steps}"):
        linear.sample(gaussian(linear), 4, steps=steps)


def test_heun_has_no_share_of_fresh_noise(linear, gaussian):
    with pytest.raises(ValueError, match="eta 0.5 for heun: only ddim and dpmpp_2m take one"):
        linear.sample(gaussian(linear), 4, sampler="heun", eta=0.5)


def test_unknown_sampler_eta_and_class_counts_are_refused(linear, gaussian):
    for options in ({"sampler": "euler"}, {"eta": 1.5, "sampler": "dpmpp_2m"}, {"eta": 0.5}, {"classes": [1, 2, 3]}):
        with pytest.raises(ValueError, match="sampler|eta|classes"):
            linear.sample(gaussian(linear), 4, batch_size=2, **options)


# ------------------------------------------------------------------ what comes out


def test_sample_is_repeated_p_sample(short, gaussian):
    model, g = gaussian(short, s=0.5), torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=g)
    for i in reversed(range(50)):
        x = short.p_sample(model, x, torch.full((2,), i), i, generator=g)
    sampled = short.sample(model, 8, batch_size=2, generator=torch.Generator().manual_seed(3), clamp=False)
    torch.testing.assert_close(sampled, x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_returns_the_image_estimate(short, gaussian, sampler):
    *_, before, (t, sample, again) = short.sample_trajectory(gaussian(short), 8, 2, sampler=sampler)
    assert t == -1 and sample is again
    assert before[0] == 0
    torch.testing.assert_close(sample, before[2], atol=1e-5, rtol=1e-5)


def test_ddim_recomputes_the_noise_after_clamping(cosine):
    """A model that always says "no noise" drives x_zero far outside [-1, 1]; clamped samples stay inside."""
    x = cosine.sample(lambda x, t: torch.zeros_like(x), 4, batch_size=4, sampler="ddim", steps=10)
    assert x.abs().max() <= 1 + 1e-4
    free = cosine.sample(lambda x, t: torch.zeros_like(x), 4, batch_size=4, sampler="ddim", steps=10, clamp=False)
    assert free.abs().max() > 100


def test_x_t_itself_is_never_clamped(cosine, gaussian):
    steps = list(cosine.sample_trajectory(gaussian(cosine, s=0.5), 4, 16, steps=20))
    assert steps[0][1].abs().max() > 2
    assert all(x_zero.abs().max() <= 1 + 1e-4 for _, _, x_zero in steps)


def test_clamping_changes_nothing_where_nothing_is_clamped(linear, gaussian):
    model = gaussian(linear, s=0.05)
    x = [
        linear.sample(model, 4, 2, steps=100, clamp=clamp, generator=torch.Generator().manual_seed(0))
        for clamp in (True, False)
    ]
    torch.testing.assert_close(*x, atol=1e-4, rtol=1e-3)


def test_samples_need_no_gradient_and_leave_the_model_alone(short, unet):
    unet.train()
    x = short.sample(unet, 8, batch_size=2, classes=[1, 2], steps=3)
    assert not x.requires_grad
    assert unet.training
    unet.eval()
    short.sample(unet, 8, batch_size=2, classes=[1, 2], steps=3)
    assert not unet.training
    assert all(not x.requires_grad for _, x, _ in short.sample_trajectory(unet, 8, 1, steps=3))


# ------------------------------------------------------------------ seeds, memory, batches


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_same_seed_same_image_whatever_the_batch_size(short, unet, sampler):
    classes = torch.arange(5)
    options = dict(classes=classes, guidance_scale=1.0, sampler=sampler, steps=8)
    whole = torch.cat(list(sample_in_batches(short, unet, 5, 5, seed=7, **options)))
    parts = torch.cat(list(sample_in_batches(short, unet, 5, 2, seed=7, **options)))
    torch.testing.assert_close(whole, parts, atol=2e-3, rtol=1e-3)  # rounding differs by batch, noise would by 1
    other = torch.cat(list(sample_in_batches(short, unet, 5, 5, seed=8, **options)))
    assert (whole - other).abs().mean() > 0.05


@pytest.mark.parametrize("first, count", [(0, 1), (0, 40), (3, 2), (15, 2), (16, 16), (31, 9)])
def test_noise_of_an_image_does_not_depend_on_the_others(first, count):
    whole, part = ImageNoise(7, 0, 40), ImageNoise(7, first, count)
    for _ in range(2):  # as many draws as a sampler likes
        assert torch.equal(part.draw((count, 3, 2, 2)), whole.draw((40, 3, 2, 2))[first : first + count])


def test_images_of_neighbouring_seeds_share_no_noise():
    noise = torch.cat([ImageNoise(seed, 0, 50).draw((50, 4)) for seed in (0, 1)])
    assert len(noise.sum(1).unique()) == 100


def test_noise_for_every_image_is_asked_for(short, unet):
    with pytest.raises(ValueError, match="the noise of 2 images for a batch of 3"):
        short.sample(unet, 8, batch_size=3, generator=ImageNoise(0, 0, 2))


@pytest.mark.parametrize("count, batch_size", [(1, 4), (7, 3), (4, 4)])
def test_any_number_of_images_in_any_batch_size(short, gaussian, count, batch_size):
    batches = list(sample_in_batches(short, gaussian(short), count, batch_size, 0, steps=2))
    assert sum(map(len, batches)) == count
    assert max(map(len, batches)) <= batch_size


def test_memory_of_a_trajectory_does_not_grow_with_its_steps(linear, gaussian):
    alive, most = [], 0
    for _, x, _ in linear.sample_trajectory(gaussian(linear), 4, 1, steps=200):
        alive.append(weakref.ref(x))
        del x
        gc.collect(0)
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 3


def test_thinned_trajectory_keeps_both_ends_in_order(linear, gaussian):
    kept = thin_trajectory(linear.sample_trajectory(gaussian(linear), 4, 1, steps=100), 101, 11)
    times = [t for t, _, _ in kept]
    assert len(kept) == 11
    assert times[0] == 999 and times[-1] == -1 and times == sorted(times, reverse=True)
    assert all(x.device.type == "cpu" for _, x, _ in kept)


# ------------------------------------------------------------------ 2.4: guidance


def test_guidance_is_eq_11_in_one_batched_call(linear, gaussian):
    model = gaussian(linear, s=0.5, mu=-0.2, class_means=[0.3, 0.6])
    x, t, classes = torch.randn(2, 3, 4, 4), torch.tensor([400, 400]), torch.tensor([0, 1])
    conditional, null = model(x, t, classes), model(x, t, torch.tensor([2, 2]))
    model.calls.clear()
    guided = guided_eps(model, x, t, classes, 1.5)
    assert model.calls == [(400, 4)]
    torch.testing.assert_close(guided, 2.5 * conditional - 1.5 * null)


def test_w_zero_is_conditional_and_w_minus_one_unconditional_at_one_forward(linear, gaussian):
    model = gaussian(linear, s=0.5, mu=-0.2, class_means=[0.3, 0.6])
    x, t, classes = torch.randn(2, 3, 4, 4), torch.tensor([400, 400]), torch.tensor([0, 1])
    assert torch.equal(guided_eps(model, x, t, classes, 0.0), model(x, t, classes))
    assert torch.equal(guided_eps(model, x, t, classes, -1.0), model(x, t))
    assert [size for _, size in model.calls] == [2, 2, 2, 2]


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guided_samples_of_gaussians_have_the_extrapolated_mean(linear, gaussian, w):
    model = gaussian(linear, s=0.3, mu=-0.1, class_means=[0.2])
    x = linear.sample(
        model,
        4,
        batch_size=512,
        classes=torch.zeros(512, dtype=torch.long),
        guidance_scale=w,
        sampler="ddim",
        clamp=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert x.mean().item() == pytest.approx((1 + w) * 0.2 + w * 0.1, abs=0.01)
    assert x.std().item() == pytest.approx(0.3, abs=0.01)


def test_guidance_without_classes_or_of_an_unconditional_model_is_an_error(short):
    unconditional = Unet(dim=8, dim_mults=(1, 2)).eval()
    x, t, classes = torch.randn(2, 3, 8, 8), torch.tensor([1, 1]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needs classes"):
        guided_eps(unconditional, x, t, None, 1.0)
    with pytest.raises(ValueError, match="class-conditional"):
        guided_eps(unconditional, x, t, classes, 1.0)
    with pytest.raises(ValueError, match="unconditional"):
        short.sample(unconditional, 8, batch_size=2, classes=classes)


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_the_model_does_not_know_are_named(short, unet, label):
    with pytest.raises(ValueError, match=r"0 .. 9, or 10 for none, got \[3, -?\d+\]"):
        short.sample(unet, 8, batch_size=2, classes=[3, label], steps=2)


def test_guidance_leaves_the_labels_as_they_were(short, unet):
    classes = torch.arange(4)
    short.sample(unet, 8, batch_size=4, classes=classes, guidance_scale=2.0, steps=2)
    assert classes.tolist() == [0, 1, 2, 3]


def test_standard_deviation_of_one_ancestral_batch_is_finite_for_every_schedule(gaussian):
    for name, schedule in SCHEDULES.items():
        diffusor = Diffusion(100, schedule, 8, "cpu")
        x = diffusor.sample(gaussian(diffusor, s=0.4), 8, batch_size=64)
        assert math.isclose(x.std().item(), 0.4, abs_tol=0.03), name


# ------------------------------------------------------------------ guidance interval


def test_guidance_is_confined_to_its_interval(linear, gaussian):
    """Outside it one prediction for the class is made, inside it two; its ends count as inside."""
    model = gaussian(linear, s=0.5, class_means=[0.5, -0.5])
    linear.sample(model, 4, 3, classes=[0, 1, 0], guidance_scale=2, steps=10, guidance_interval=(0.193, 0.545))
    assert [n for _, n in model.calls] == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]
    assert [t for t, n in model.calls if n == 6] == [544, 414, 296, 192]


def test_the_whole_interval_is_guidance_everywhere_and_an_empty_one_none(linear, gaussian):
    model = gaussian(linear, s=0.5, class_means=[0.5, -0.5])

    def samples(w, **interval):
        g = torch.Generator().manual_seed(0)
        return linear.sample(model, 4, 2, classes=[0, 1], guidance_scale=w, steps=5, generator=g, **interval)

    assert torch.equal(samples(2), samples(2, guidance_interval=(0, 1)))
    assert torch.equal(samples(2, guidance_interval=(0.3, 0.3)), samples(0))


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1), (0, 1.1)])
def test_impossible_intervals_are_refused(linear, gaussian, interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        linear.sample(gaussian(linear), 4, guidance_interval=interval)


def test_what_the_skeleton_is_often_given_is_named():
    with pytest.raises(ValueError, match="takes the number of timesteps alone, as lambda t: linear_beta_schedule"):
        Diffusion(100, linear_beta_schedule, 16)
    for classes in ([0.0, 1.0], [True, False]):
        with pytest.raises(ValueError, match="classes must be 2 labels"):
            Diffusion(50, SCHEDULES["cosine"], 8, "cpu").sample(lambda x, t, c: x, 8, 2, classes=classes)
    with pytest.raises(ValueError, match=r"image_size is one number, .* got \(16, 16\)"):
        Diffusion(50, SCHEDULES["cosine"], 16, "cpu").sample(lambda x, t: x, (16, 16))


def test_a_model_in_training_mode_samples_as_in_eval_mode_and_stays_in_it(short):
    """Labels were dropped: 14 of 40 images differed."""
    torch.manual_seed(0)
    model = Unet(dim=8, dim_mults=(1, 2), class_free_guidance=True, num_classes=3, p_uncond=0.5)
    model.class_emb.weight.data.mul_(20)
    images = []
    for mode in (True, False):
        model.train(mode)
        noise = ImageNoise(0, 0, 40)
        images.append(short.sample(model, 8, 40, classes=torch.arange(40) % 3, steps=3, generator=noise))
        assert model.training == mode
    assert torch.equal(*images)


# ------------------------------------------------------------------ samples that start from an image


def image_of_ramp():
    return torch.linspace(-1, 1, 48).reshape(3, 4, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fraction", [0.05, 0.6, 1.0])
def test_samples_from_an_image_start_at_eq_4_and_take_the_timesteps_below(linear, gaussian, sampler, fraction):
    image, g = image_of_ramp(), torch.Generator().manual_seed(3)
    how = {"sampler": sampler, "steps": 20, "start_image": image, "start_fraction": fraction}
    steps = list(linear.sample_trajectory(gaussian(linear), 4, 2, generator=g, **how))
    allowed = [t for t in subsample_timesteps(1000, 20).tolist() if t + 1 <= fraction * 1000]
    assert [t for t, _, _ in steps] == [*reversed(allowed), -1]
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    wanted = linear.q_sample(image.expand(2, -1, -1, -1), torch.full((2,), allowed[-1]), noise)
    torch.testing.assert_close(steps[0][1], wanted, rtol=1e-5, atol=1e-6)


def test_the_part_up_to_a_timestep_takes_as_many_noising_steps(linear):
    assert [linear.until(count).timesteps for count in (1, 600, 1000)] == [1, 600, 1000]
    assert linear.timesteps == 1000  # the whole process is left alone


def test_the_more_an_image_is_noised_the_less_is_left_of_it(linear, gaussian):
    """For data N(0, 1), DDIM keeps x_t, so a sample has the correlation sqrt(abar_t) with its start image."""
    image = image_of_ramp() / image_of_ramp().std(unbiased=False) / 2
    for fraction in (0.05, 0.3, 1.0):
        how = {"sampler": "ddim", "start_image": image, "start_fraction": fraction, "clamp": False}
        generator = torch.Generator().manual_seed(0)
        x = linear.sample(gaussian(linear), 4, 400, generator=generator, **how)
        left = (x * image).mean() / image.square().mean()
        assert left == pytest.approx(linear.sqrt_alphas_bar[round(fraction * 1000) - 1].item(), abs=0.03)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_start_fraction_out_of_range_is_refused(linear, gaussian, fraction):
    with pytest.raises(ValueError, match="start_fraction is a fraction of T"):
        linear.sample(gaussian(linear), 4, start_image=image_of_ramp(), start_fraction=fraction)


def test_a_start_fraction_below_every_sampling_step_is_refused(linear, gaussian):
    with pytest.raises(ValueError, match="none of the 1 sampling steps"):
        linear.sample(gaussian(linear), 4, steps=1, start_image=image_of_ramp(), start_fraction=0.5)
