"""What is true of every right solution of the exercise, whoever wrote it: the diffusion process, 2.2 a to d and 2.3.

A fact asks a submission, which runs in another process, for the results of its functions. It compares them with a
closed form, and knows what common slips look like. What comes back may be anything: a fact holds only where it fits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ex2.grading.submission import BETAS, T
from ex2.grading.verdicts import Fact, NotRight, check, expect, images, like, random_images

TIMES = torch.arange(T)
AS_GOOD = "sigma^2 is the posterior variance, which footnote 2 of the sheet calls as good as beta_t"
UNIFORM = "uniform noise (torch.rand), Gaussian is asked for (torch.randn)"
SIGMOID = "the sigmoid schedule's range: "


def tables(betas: Tensor) -> tuple[Tensor, ...]:
    """What Eqs. 4 and 8 are made of: (beta_t, alpha_t, alpha-bar_t, posterior variance), in float64."""
    beta, alpha = betas.double(), 1 - betas.double()
    abar = torch.cumprod(alpha, 0)
    return beta, alpha, abar, beta * (1 - abar / alpha) / (1 - abar)


BETA, ALPHA, ABAR, POSTERIOR = tables(BETAS)


def expect_gaussian(noise: Tensor, what: str) -> None:
    """Raises `NotRight` unless the noise has the shape of a Gaussian: excess kurtosis 0 (-1.2 for uniform numbers)."""
    values = noise.double().flatten()
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean().item() - 3
    looks_like = UNIFORM if kurtosis < -1 else ""
    check(abs(kurtosis) <= 0.3, f"{what} with excess kurtosis {kurtosis:.2f}", "0, of a Gaussian", looks_like)


def expect_standard_normal(noise: Tensor, what: str) -> None:
    """Raises `NotRight` for another distribution than N(0, I)."""
    expect_gaussian(noise, what)
    expect(noise.mean(), 0.0, {}, f"mean of {what}", scale=0.03)
    expect(noise.std(), 1.0, {}, f"standard deviation of {what}", rel=0.03)


def q_sample(submission, x_zero: Tensor, t: Tensor, **noise: Tensor) -> Tensor:
    return submission.diffuse("q_sample", x_zero=x_zero, t=t, **noise)["result"]


def p_sample(submission, x: Tensor, eps: float, t: int, seed: int = 0) -> Tensor:
    """x_{t-1} of images x where the network predicts `eps` everywhere."""
    times = torch.full((len(x),), t)
    return submission.diffuse("p_sample", {"shift": eps}, seed=seed, x=x, t=times, t_index=t)["result"]


def sample(submission, stub: dict, count: int = 4, betas: Tensor = BETAS, **given) -> dict:
    """The whole reverse process, with `result`, images (count, 3, 8, 8)."""
    return submission.diffuse("sample", stub, betas, image_size=8, batch_size=count, channels=3, **given)


def loss(submission, stub: dict, x_zero: Tensor, loss_type: str = "l2", **noise: Tensor) -> float:
    """The loss at t = 4."""
    times = torch.full((len(x_zero),), 4)
    return submission.diffuse("p_losses", stub, x_zero=x_zero, t=times, **noise, loss_type=loss_type)["result"].item()


@Fact("2.2 a, c", "q_sample keeps sqrt(alpha-bar_t) of the image", "Eq. 4")
def forward_signal(submission) -> None:
    slips = {
        "root of alpha-bar left out": ABAR,
        "root of alpha-bar taken twice": ABAR**0.25,
        "alpha_t of one step in place of the product": ALPHA.sqrt(),
        "the image has the factor of the noise": (1 - ABAR).sqrt(),
        "the image is not scaled at all": torch.ones(T),
    }
    found = q_sample(submission, images(1.0, T), TIMES, noise=images(0.0, T)).flatten(1).mean(1)
    expect(found, ABAR.sqrt(), slips, "factor of the image")


@Fact("2.2 a, c", "q_sample adds sqrt(1 - alpha-bar_t) of the noise", "Eq. 4")
def forward_noise(submission) -> None:
    slips = {
        "root of 1 - alpha-bar left out": 1 - ABAR,
        "beta_t of one step": BETA.sqrt(),
        "the noise is not scaled at all": torch.ones(T),
    }
    found = q_sample(submission, images(0.0, T), TIMES, noise=images(1.0, T)).flatten(1).mean(1)
    expect(found, (1 - ABAR).sqrt(), slips, "factor of the noise")


@Fact("2.2 c", "q_sample draws Gaussian noise, new for each image", "Eq. 4")
def forward_draws(submission) -> None:
    noise = q_sample(submission, images(0.0, 256), torch.full((256,), T - 1)) / math.sqrt(1 - ABAR[-1])
    own, slip = not torch.allclose(noise[0], noise[1]), "noise drawn without the batch's shape"
    check(own, "the same noise for all images of a batch", "new noise for each", slip)
    expect_standard_normal(noise, "the noise")


def step_factors(submission, x: float, eps: float) -> Tensor:
    """What p_sample makes of an image and of a prediction of one value, (T,), by its difference to 0 at equal noise."""
    inputs = (images(x), eps), (images(0.0), 0.0)
    steps = ([like(images(x), p_sample(submission, *given, t)) for given in inputs] for t in range(T))
    return torch.stack([(step - without).double().mean() / (x or eps) for step, without in steps])


@Fact("2.2 a, d", "p_sample scales x_t by 1 / sqrt(alpha_t)", "Eq. 8")
def reverse_image(submission) -> None:
    slips = {
        "root of alpha_t left out": 1 / ALPHA,
        "root of alpha_t taken twice": ALPHA**-0.25,
        "alpha-bar_t in place of alpha_t": ABAR**-0.5,
        "sqrt(alpha_t) multiplied, not divided": ALPHA.sqrt(),
        "x_t is not scaled at all": torch.ones(T),
    }
    expect(step_factors(submission, 0.1, 0.0), ALPHA**-0.5, slips, "factor of x_t")


@Fact("2.2 a, d", "p_sample subtracts beta_t / sqrt(1 - alpha-bar_t) of the predicted noise", "Eq. 8")
def reverse_prediction(submission) -> None:
    right = -BETA / (1 - ABAR).sqrt() / ALPHA.sqrt()
    slips = {
        "root of 1 - alpha-bar left out": -BETA / (1 - ABAR) / ALPHA.sqrt(),
        "alpha_t in place of alpha-bar_t": -BETA / BETA.sqrt() / ALPHA.sqrt(),
        "not divided by sqrt(alpha_t)": right * ALPHA.sqrt(),
        "root of alpha_t taken twice": right * ALPHA**0.25,
        "the noise is added, not subtracted": -right,
    }
    expect(step_factors(submission, 0.0, 0.1), right, slips, "factor of the predicted noise")


@Fact("2.2 a, d", "p_sample adds Gaussian noise of variance beta_t", "Eq. 8")
def reverse_noise(submission) -> None:
    noise = [p_sample(submission, images(0.0, 256), 0.0, t).double() for t in range(2, T)]  # 1: `reverse_first_noise`
    if noise[-1].std() > 0:
        expect_gaussian(noise[-1], "noise")
    found, late = torch.tensor([0.0, 0.0, *(values.std() for values in noise)]), TIMES > 1
    slips = {
        "the posterior variance without its root": late * POSTERIOR,
        "root of beta_t left out": late * BETA,
        "no noise at all": torch.zeros(T),
        "standard normal noise, not scaled": late,
    }
    allowed = {AS_GOOD: late * POSTERIOR.sqrt()}
    expect(found, late * BETA.sqrt(), slips, "standard deviation of the noise", rel=0.02, allowed=allowed)


@Fact("2.2 d", "p_sample adds no noise at t = 0, and only there", "Eq. 8")
def reverse_first_noise(submission) -> None:
    noisy = [not torch.equal(*(p_sample(submission, images(0.5), 0.1, t, seed) for seed in (0, 1))) for t in (0, 1)]
    check(not noisy[0], "noise at t = 0", "none: z = 0 there", "noise is added to the finished image")
    slip = "the last step is taken for t = 1, counted as in the paper"
    check(noisy[1], "no noise at t = 1", "noise of variance beta_1", slip)


@Fact("2.2 d", "p_losses: l2 is the mean squared error, l1 the mean absolute one", "Eq. 9")
def loss_values(submission) -> None:
    noise = images(1.0, 8)
    noise[4:] = 3
    x_t, size = q_sample(submission, images(0.3, 8), torch.full((8,), 4), noise=noise), noise.numel()
    for kind, right, of_input in (("l2", 5.0, x_t.square().mean()), ("l1", 2.0, x_t.abs().mean())):
        slips = {
            "summed over the pixels, not averaged": right * size,
            "the root of the mean squared error": right**0.5,
            "the root of the sum": (right * size) ** 0.5,
            "summed over each image": right * size / 8,
            "the loss is to x_t, not to the noise": of_input,
            "the loss is to x_t and summed": of_input * size,
            "the loss is to x_t, the root of its sum": (of_input * size) ** 0.5,
            "the loss is to x_0, not to the noise": {"l2": 0.09, "l1": 0.3}[kind],
            "the other of the two losses": 7.0 - right,
        }
        found = loss(submission, {}, images(0.3, 8), kind, noise=noise)
        expect(found, right, slips, f"{kind} loss of a predictor of zeros", rel=1e-3)


@Fact("2.2 d", "p_losses compares the prediction with the noise", "Eq. 9")
def loss_target(submission) -> None:
    x_zero, noise = images(0.3, 8), random_images(8)
    predicted = {"": {"shift": noise}, "the target is x_0": {"shift": x_zero}, "the target is x_t": {"scale": 1.0}}
    losses = {name: loss(submission, stub, x_zero, noise=noise) for name, stub in predicted.items()}
    looks_like = next((name for name, value in losses.items() if value < 1e-6), "")
    check(losses[""] <= 1e-6, f"loss {losses['']:.4g} where the noise is predicted exactly", "0", looks_like)


@Fact("2.2 d", "p_losses draws Gaussian noise, the same for x_t and for the target", "Eq. 9")
def loss_draws(submission) -> None:
    found = loss(submission, {"scale": 1 / math.sqrt(1 - ABAR[4])}, images(0.0, 256))
    looks_like = "noise is drawn twice" if abs(found - 2) < 0.2 else ""
    check(found <= 1e-3, f"loss {found:.4g} of a predictor that reads the noise off x_t", "0", looks_like)
    found = loss(submission, {}, images(0.0, 256))
    expect(found, 1.0, {UNIFORM: 1 / 3}, "loss of a predictor of zeros", rel=0.05)


@Fact("2.2 b", "sample visits t = T-1, ..., 0, each once", "Algorithm 2")
def sample_times(submission) -> None:
    times = [call["t"] for call in sample(submission, {})["calls"]]
    times = [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]  # two calls at one time: `guidance_calls`
    expected = list(range(T))[::-1]
    slips = {
        "t = 0 is never visited": expected[:-1],
        "t = T-1 is never visited": expected[1:],
        "from 0 to T-1: the wrong way round": expected[::-1],
        "counted from T to 1": [t + 1 for t in expected],
    }
    looks_like = next((text for text, other in slips.items() if times == other), "")
    found = f"times {', '.join(map(str, times[:3]))} ... {times[-1] if times else ''}"
    check(times == expected, found, "9, 8, 7 ... 0", looks_like)


@Fact("2.2 b", "sample starts from standard normal noise", "Algorithm 2")
def sample_start(submission) -> None:
    expect_standard_normal(sample(submission, {}, count=128)["start"], "x_T")


@Fact("2.2 b", "sample returns the images, without a gradient", "Algorithm 2")
def sample_result(submission) -> None:
    result = sample(submission, {})
    like(images(0.0), result["result"])
    slip = "@torch.no_grad() is missing: all steps stay in memory"
    check(result["gradient"] is False, "images with a gradient", "none", slip)


@Fact("2.2 b", "samples of a Gaussian have its spread, with the best possible predictor", "Eqs. 4, 8")
def sample_spread(submission) -> None:
    betas, spread = torch.linspace(5e-4, 0.1, 200), 0.25
    _, alphas, abar, posterior = tables(betas)
    variance = abar * spread**2 + 1 - abar  # of x_t

    def spread_of(added: Tensor) -> Tensor:
        """The standard deviation of samples, with so much variance added at each step."""
        expected = torch.ones(())
        for t in reversed(range(len(betas))):
            expected = (1 - (1 - alphas[t]) / variance[t]) ** 2 / alphas[t] * expected + (added[t] if t else 0)
        return expected.sqrt()

    found = sample(submission, {"scale": ((1 - abar).sqrt() / variance).float()}, 64, betas)["result"].double().std()
    allowed = {AS_GOOD: spread_of(posterior)}
    expect(found, spread_of(1 - alphas), {}, "standard deviation of samples", rel=0.04, allowed=allowed)


def check_length(betas: Tensor, timesteps: int) -> None:
    """Raises `NotRight` where there are not T betas, each strictly between 0 and 1."""
    slips = {timesteps + 1: "0 .. T has T + 1 entries", timesteps - 1: "T points have T - 1 ratios"}
    found = f"{len(betas)} betas"
    check(len(betas) == timesteps, found, f"{timesteps}, one per timestep", slips.get(len(betas), ""))
    inside = ((betas > 0) & (betas < 1)).all()
    check(inside, f"betas from {betas.min():.4g} to {betas.max():.4g}", "all strictly between 0 and 1")


@Fact("2.3", "the linear schedule runs from beta_start to beta_end")
def linear_schedule(submission) -> None:
    betas = submission.schedule("linear", beta_start=1e-4, beta_end=0.02, timesteps=1000)
    check_length(betas, 1000)
    expect(betas, torch.linspace(1e-4, 0.02, 1000), {}, "beta")


def cosine(s=0.008, power=2, least=0.0, most=0.999, steps=1000) -> Tensor:
    """Betas of the cosine schedule."""
    x = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = torch.cos((x + s) / (1 + s) * math.pi / 2) ** power
    return (1 - abar[1:] / abar[:-1]).clamp(least, most)


@Fact("2.3", "the cosine schedule is that of the paper, cut off at 0.999", "Nichol and Dhariwal 2021, Eq. 17")
def cosine_schedule(submission) -> None:
    betas, short = submission.schedule("cosine", timesteps=1000), cosine(steps=999)
    slips = {
        "cut off at 0.9999, not at 0.999": cosine(most=0.9999),
        "cut off at 0.0001 below and at 0.9999, not only at 0.999": cosine(least=1e-4, most=0.9999),
        "cut off at 0.02, as if it were linear": cosine(most=0.02),
        "cut off at 0.0001 below and at 0.02, as if it were linear": cosine(least=1e-4, most=0.02),
        "offset s left out": cosine(s=0.0),
        "the cosine is not squared": cosine(power=1),
        "the last beta is appended: T - 1 ratios of T values": torch.cat((short, short[-1:])),
    }
    allowed = {
        "cut off at 0.0001 below, which changes the first steps only": cosine(least=1e-4),
        "cut off at 0.001 below, which changes the first steps only": cosine(least=1e-3),
    }
    low, high = betas.min(), betas.max()
    if len(betas) == 1000 and (low <= 0 or (betas == low).sum() > 900):
        slip = "the ratio of alpha-bar is inverted: a step divides the later one by the earlier one"
        raise NotRight("wrong", f"betas from {low:.4g} to {high:.4g}", "4.1e-05 to 0.999", slip if high <= 1e-3 else "")
    cut = len(betas) != 1000 or betas[-1] <= 0.99999
    check(cut, f"beta {betas[-1]:.6f} at t = 999", "0.999", "clip missing at 0.999")
    check_length(betas, 1000)
    expect(betas, cosine(), slips, "beta", rel=5e-4, scale=3e-7, allowed=allowed)


@Fact("2.3", "the sigmoid schedule is Eq. 10, between beta_start and beta_end", "Eq. 10")
def sigmoid_schedule(submission) -> None:
    for start, end, timesteps in ((1e-4, 0.02, 1000), (1e-3, 0.3, 60)):
        betas = submission.schedule("sigmoid", beta_start=start, beta_end=end, timesteps=timesteps)
        check_length(betas, timesteps)
        fixed = start == 1e-3 and betas[-1] < 0.1
        slip = "beta_start and beta_end are overwritten"
        check(not fixed, f"beta {betas[-1]:.4g} at the end", "nearly beta_end, 0.3", slip)
        inside, found = betas[0] >= start and betas[-1] <= end, f"betas from {betas[0]:.4g} to {betas[-1]:.4g}"
        check(inside, found, f"within {start:g} and {end:g}", f"{SIGMOID}not scaled to beta_start .. beta_end")
        # The sheet leaves open how t runs from 0 to T, and solutions choose s_limit: any sigmoid over -s .. s is right.
        fractions, steps, quarter = (betas - start) / (end - start), torch.arange(timesteps).double(), timesteps // 4
        x = torch.logit(fractions.clamp(1e-9, 1 - 1e-9))
        for grid in (steps / (timesteps - 1), steps / timesteps, (steps + 1) / timesteps):
            limit = (-x[quarter] / (1 - 2 * grid[quarter])).item()
            if 3 <= limit <= 20 and ((torch.sigmoid(limit * (2 * grid - 1)) - fractions).abs() < 2e-4).all():
                break
        else:
            slip = f"{SIGMOID}0 .. 1 in place of -s .. s" if abs(x[0]) < 0.01 else ""
            found = f"beta {betas[timesteps // 2]:.4g} in the middle, {betas[0]:.4g} at first"
            raise NotRight("wrong", found, f"{(start + end) / 2:.4g} and nearly {start:g}, with s of 3 to 20", slip)
