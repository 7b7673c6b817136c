"""What is true of every right solution of the exercise, 2.1 to 2.4, whoever wrote it: the facts of `check`.

A fact asks a submission, which runs in another process, for the results of its functions. It compares them with a
closed form, and knows what common slips look like. What comes back may be anything: a fact holds only where it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from ex2.grading.submission import BETAS, ONE_BETA, P_UNCOND, Missing, Submission, T

TIMES = torch.arange(T)


class Failed(Exception):
    """The submission's code raised an error, or its process ended.

    Args:
        verdict: "fails", or "hangs" where it took too long.
    """

    def __init__(self, found: str, verdict: str = "fails"):
        super().__init__(found)
        self.verdict = verdict


@dataclass
class Wrong(Exception):
    """What was found in place of what was expected, and what that looks like; `differs`: the sheet allows it."""

    found: str
    expected: str
    looks_like: str = ""
    differs: bool = False


@dataclass(frozen=True)
class Fact:
    """A statement with its sub-task and equation, and the function that raises where it isn't true of a submission."""

    task: str
    statement: str
    equation: str
    check: Callable[[Submission], None]
    advice: bool = False  # good to follow, but a solution without it is not wrong


FACTS: dict[str, Fact] = {}
POSTERIOR = "sigma^2 is the posterior variance, which footnote 2 of the sheet calls as good as beta_t"
UNIFORM = "uniform noise (torch.rand), Gaussian is asked for (torch.randn)"


def fact(task: str, statement: str, equation: str = "", advice: bool = False):
    """Puts a function into `FACTS`."""

    def register(check):
        FACTS[check.__name__] = Fact(task, statement, equation, check, advice)
        return check

    return register


def check(condition, found: str, expected: str, looks_like: str = "") -> None:
    """Raises `Wrong` where a condition does not hold."""
    if not condition:
        raise Wrong(found, expected, looks_like)


def expect(found, expected, slips: Mapping | None = None, allowed: Mapping | None = None, **options) -> None:
    """Raises `Wrong` where a number, or one of several (at `TIMES`), is not as expected.

    Args:
        slips: what it looks like -> the number that such a slip would give.
        allowed: the same of what the sheet calls as good.
        where: what the number is.
        rel: relative tolerance.
        scale: added to the tolerance, for small numbers.
    """
    where, rel, scale = (
        options.get(name, default) for name, default in (("where", ""), ("rel", 2e-3), ("scale", 1e-6))
    )
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))

    def close(value) -> bool:
        value = torch.as_tensor(value, dtype=torch.float64)
        return bool(((found - value).abs() <= rel * value.abs() + scale).all())

    if found.shape == expected.shape and close(expected):
        return
    both = {**(slips or {}), **(allowed or {})}
    looks_like = next((text for text, value in both.items() if close(value)), "")
    at = ""
    if found.ndim:
        worst = int((found - expected).abs().argmax())
        found, expected, at = found[worst], expected[worst], f" at t = {worst}"
    raise Wrong(f"{where} {found:.4g}{at}".strip(), f"{expected:.4g}", looks_like, looks_like in (allowed or {}))


def expect_gaussian(noise: Tensor, what: str) -> None:
    """Raises `Wrong` unless the noise has the shape of a Gaussian: excess kurtosis 0 (-1.2 for uniform numbers)."""
    values = noise.double().flatten()
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean().item() - 3
    looks_like = UNIFORM if kurtosis < -1 else ""
    check(abs(kurtosis) <= 0.3, f"{what} with excess kurtosis {kurtosis:.2f}", "0, of a Gaussian", looks_like)


def expect_standard_normal(noise: Tensor, what: str) -> None:
    """Raises `Wrong` for another distribution than N(0, I)."""
    expect_gaussian(noise, what)
    expect(noise.mean(), 0.0, where=f"mean of {what}", scale=0.03)
    expect(noise.std(), 1.0, where=f"standard deviation of {what}", rel=0.03)


def tables(betas: Tensor = BETAS) -> SimpleNamespace:
    """What Eqs. 4 and 8 are made of, in float64."""
    betas = betas.double()
    alphas_bar = torch.cumprod(1 - betas, 0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alphas_bar[:-1]))
    posterior = betas * (1 - before) / (1 - alphas_bar)
    return SimpleNamespace(betas=betas, alphas=1 - betas, alphas_bar=alphas_bar, before=before, posterior=posterior)


def images(value: float, count: int = 4) -> Tensor:
    """Images (count, 3, 8, 8) of one value."""
    return torch.full((count, 3, 8, 8), value)


def like(x: Tensor, found: Tensor) -> Tensor:
    """What was found, where it has the shape of x."""
    check(found.shape == x.shape, f"shape {tuple(found.shape)}", f"{tuple(x.shape)}")
    return found


def random_image(size: int = 8) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@fact("2.1", "the U-Net gives an image of the size it gets, finite")
def unet_shape(submission: Submission) -> None:
    x = random_image(16).repeat(2, 1, 1, 1)
    out = like(x, submission.forward(x, torch.tensor([0, 7]))["out"])
    check(out.isfinite().all(), "infinite numbers", "finite ones")


@fact("2.1", "the U-Net gets the time, each image its own")
def unet_time(submission: Submission) -> None:
    x, times = random_image(16).expand(2, -1, -1, -1), ([1, 1], [500, 500], [1, 500])
    early, late, both = (like(x, submission.forward(x, torch.tensor(t))["out"]) for t in times)
    differ = not torch.allclose(early, late, atol=1e-6)
    check(differ, "the same output at t = 1 and t = 500", "different ones", "the time embedding reaches no block")
    own = torch.allclose(both, torch.stack((early[0], late[1])), atol=1e-3 * late.abs().max().item())
    check(own, "an output that depends on the times of other images", "one for each image")


@fact("2.2 a, c", "q_sample keeps sqrt(alpha-bar_t) of the image", "Eq. 4")
def forward_signal(submission: Submission) -> None:
    tab = tables()
    slips = {
        "root of alpha-bar left out": tab.alphas_bar,
        "root of alpha-bar taken twice": tab.alphas_bar**0.25,
        "alpha_t of one step in place of the product": tab.alphas.sqrt(),
        "alpha-bar of the step before": tab.before.sqrt(),
        "the image has the factor of the noise": (1 - tab.alphas_bar).sqrt(),
        "the image is not scaled at all": torch.ones(T),
    }
    found = submission.q_sample(images(1.0, T), TIMES, images(0.0, T)).flatten(1).mean(1)
    expect(found, tab.alphas_bar.sqrt(), slips, where="factor of the image")


@fact("2.2 a, c", "q_sample adds sqrt(1 - alpha-bar_t) of the noise", "Eq. 4")
def forward_noise(submission: Submission) -> None:
    tab = tables()
    slips = {
        "root of 1 - alpha-bar left out": 1 - tab.alphas_bar,
        "root of 1 - alpha-bar taken twice": (1 - tab.alphas_bar) ** 0.25,
        "beta_t of one step": tab.betas.sqrt(),
        "the noise is not scaled at all": torch.ones(T),
        "1 - sqrt(alpha-bar)": 1 - tab.alphas_bar.sqrt(),
    }
    found = submission.q_sample(images(0.0, T), TIMES, images(1.0, T)).flatten(1).mean(1)
    expect(found, (1 - tab.alphas_bar).sqrt(), slips, where="factor of the noise")


@fact("2.2 c", "q_sample draws Gaussian noise, new for each image", "Eq. 4")
def forward_draws(submission: Submission) -> None:
    noise = submission.q_sample(images(0.0, 256), torch.full((256,), T - 1)) / math.sqrt(1 - tables().alphas_bar[-1])
    shared, slip = torch.allclose(noise[0], noise[1]), "noise drawn without the batch's shape"
    check(not shared, "the same noise for all images of a batch", "new noise for each", slip)
    expect_standard_normal(noise, "the noise")


def step_factors(submission: Submission, x: float, eps: float) -> Tensor:
    """What p_sample makes of an image and of a prediction of one value, (T,), by its difference to 0 at equal noise."""
    inputs = (images(x), eps), (images(0.0), 0.0)
    steps = ([like(images(x), submission.p_sample(*given, t)) for given in inputs] for t in range(T))
    return torch.stack([(step - without).double().mean() / (x or eps) for step, without in steps])


@fact("2.2 a, d", "p_sample scales x_t by 1 / sqrt(alpha_t)", "Eq. 8")
def reverse_image(submission: Submission) -> None:
    tab = tables()
    slips = {
        "root of alpha_t left out": 1 / tab.alphas,
        "root of alpha_t taken twice": tab.alphas**-0.25,
        "alpha-bar_t in place of alpha_t": tab.alphas_bar**-0.5,
        "sqrt(alpha_t) multiplied, not divided": tab.alphas.sqrt(),
        "x_t is not scaled at all": torch.ones(T),
    }
    expect(step_factors(submission, 0.1, 0.0), tab.alphas**-0.5, slips, where="factor of x_t")


@fact("2.2 a, d", "p_sample subtracts beta_t / sqrt(1 - alpha-bar_t) of the predicted noise", "Eq. 8")
def reverse_prediction(submission: Submission) -> None:
    tab = tables()
    right = -tab.betas / (1 - tab.alphas_bar).sqrt() / tab.alphas.sqrt()
    slips = {
        "root of 1 - alpha-bar left out": -tab.betas / (1 - tab.alphas_bar) / tab.alphas.sqrt(),
        "alpha_t in place of alpha-bar_t": -tab.betas / tab.betas.sqrt() / tab.alphas.sqrt(),
        "not divided by sqrt(alpha_t)": right * tab.alphas.sqrt(),
        "divided by sqrt(alpha_t) twice": right / tab.alphas.sqrt(),
        "root of alpha_t taken twice": right * tab.alphas**0.25,
        "the noise is added, not subtracted": -right,
        "alpha_t in place of beta_t": right * tab.alphas / tab.betas,
    }
    expect(step_factors(submission, 0.0, 0.1), right, slips, where="factor of the predicted noise")


@fact("2.2 a, d", "p_sample adds Gaussian noise of variance beta_t", "Eq. 8")
def reverse_noise(submission: Submission) -> None:
    tab = tables()
    noise = [submission.p_sample(images(0.0, 256), 0.0, t).double() for t in range(1, T)]
    if noise[-1].std() > 0:
        expect_gaussian(noise[-1], "noise")
    found = torch.stack([torch.zeros((), dtype=torch.float64), *(values.std() for values in noise)])
    allowed = {POSTERIOR: tab.posterior.sqrt()}
    slips = {
        "the posterior variance without its root": tab.posterior,
        "root of beta_t left out": tab.betas,
        "no noise at all": torch.zeros(T),
        "standard normal noise, not scaled": torch.ones(T),
        "the noise is divided by sqrt(alpha_t) as well": (tab.betas / tab.alphas).sqrt(),
    }
    expected = tab.betas.sqrt()
    for values in (expected, *slips.values(), *allowed.values()):
        values[0] = 0
        values[1] = values[1] if found[1] else 0  # whether there is any at t = 1: `reverse_first_noise`
    expect(found, expected, slips, allowed, where="standard deviation of the noise", rel=0.02)


@fact("2.2 d", "p_sample adds no noise at t = 0, and only there", "Eq. 8")
def reverse_first_noise(submission: Submission) -> None:
    noisy = [not torch.equal(*(submission.p_sample(images(0.5), 0.1, t, seed) for seed in (0, 1))) for t in (0, 1)]
    check(not noisy[0], "noise at t = 0", "none: z = 0 there", "noise is added to the finished image")
    slip = "the last step is taken for t = 1, counted as in the paper"
    check(noisy[1], "no noise at t = 1", "noise of variance beta_1", slip)


@fact("2.2 d", "p_losses: l2 is the mean squared error, l1 the mean absolute one", "Eq. 9")
def loss_values(submission: Submission) -> None:
    noise, t = images(1.0, 8), torch.full((8,), 4)
    noise[4:] = 3
    x_t, size = submission.q_sample(images(0.3, 8), t, noise), noise.numel()
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
        found = submission.loss({}, images(0.3, 8), t, kind, noise=noise)["loss"]
        expect(found, right, slips, where=f"{kind} loss of a predictor of zeros", rel=1e-3)


@fact("2.2 d", "p_losses compares the prediction with the noise", "Eq. 9")
def loss_target(submission: Submission) -> None:
    x_zero, noise = images(0.3, 8), random_image().repeat(8, 1, 1, 1)
    predicted = {
        "": {"shift": noise},
        "the target is x_0": {"shift": x_zero},
        "the target is x_t": {"scale": 1.0},
    }
    t = torch.full((8,), 4)
    losses = {name: submission.loss(stub, x_zero, t, noise=noise)["loss"] for name, stub in predicted.items()}
    looks_like = next((name for name in predicted if losses[name] < 1e-6), "")
    check(losses[""] <= 1e-6, f"loss {losses['']:.4g} where the noise is predicted exactly", "0", looks_like)


@fact("2.2 d", "p_losses draws Gaussian noise, the same for x_t and for the target", "Eq. 9")
def loss_draws(submission: Submission) -> None:
    t, factor = torch.full((256,), 4), math.sqrt(1 - tables().alphas_bar[4])
    loss = submission.loss({"scale": 1 / factor}, images(0.0, 256), t)["loss"]
    looks_like = "noise is drawn twice" if abs(loss - 2) < 0.2 else ""
    check(loss <= 1e-3, f"loss {loss:.4g} of a predictor that reads the noise off x_t", "0", looks_like)
    found = submission.loss({}, images(0.0, 256), t)["loss"]
    expect(found, 1.0, {UNIFORM: 1 / 3}, where="loss of a predictor of zeros", rel=0.05)


@fact("2.2 b", "sample visits t = T-1, ..., 0, each once", "Algorithm 2")
def sample_times(submission: Submission) -> None:
    times = [call["t"] for call in submission.sample({})["calls"]]
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


@fact("2.2 b", "sample starts from standard normal noise", "Algorithm 2")
def sample_start(submission: Submission) -> None:
    expect_standard_normal(submission.sample({}, count=128)["start"], "x_T")


@fact("2.2 b", "sample returns the images, without a gradient", "Algorithm 2")
def sample_result(submission: Submission) -> None:
    result = submission.sample({})
    shape = tuple(result["images"].shape)
    check(shape == (4, 3, 8, 8), f"shape {shape}", "(4, 3, 8, 8)")
    slip = "@torch.no_grad() is missing: all steps stay in memory"
    check(result["gradient"] is False, "images with a gradient", "none", slip)


@fact("2.2 b", "samples of a Gaussian have its spread, with the best possible predictor", "Eqs. 4, 8")
def sample_spread(submission: Submission) -> None:
    betas, spread = torch.linspace(5e-4, 0.1, 200), 0.25
    tab = tables(betas)
    variance = tab.alphas_bar * spread**2 + 1 - tab.alphas_bar  # of x_t
    shrink = ((1 - tab.alphas_bar).sqrt() / variance).float()

    def spread_of(added: Tensor) -> Tensor:
        """The standard deviation of samples, with so much variance added at each step."""
        expected = torch.ones(())
        for t in reversed(range(len(betas))):
            expected = (1 - tab.betas[t] / variance[t]) ** 2 / tab.alphas[t] * expected + (added[t] if t else 0)
        return expected.sqrt()

    found = submission.sample({"scale": shrink}, 64, betas)["images"].double().std()
    allowed = {POSTERIOR: spread_of(tab.posterior)}
    expect(found, spread_of(tab.betas), {}, allowed, where="standard deviation of samples", rel=0.04)


@fact("2.2 e", "the test loop judges in eval mode, without gradients")
def test_loop(submission: Submission) -> None:
    plain = submission.outline
    if plain["test_is_empty"]:
        raise Missing("test is an empty stub")
    calls = submission.run_test()["calls"]
    check(calls, "a test loop that never calls the model", "losses of the test set")
    in_training = any(call["training"] for call in calls) and not plain["eval_elsewhere"]  # the caller may have done it
    slip = "model.eval() is missing: labels are dropped in the test"
    check(not in_training, "the model in training mode", "eval mode", slip)
    check(not any(call["gradients"] for call in calls), "gradients", "none", "torch.no_grad() is missing")


@fact("2.2 e", "a Fréchet distance (FID) is of at least 100 images", advice=True)
def fid_images(submission: Submission) -> None:
    submission.load("main")
    count = submission.outline["fid_images"]
    slip = f"FID on {count} images: most of it is the error of so few"
    check(count is None or count >= 100, f"{count} images", "100 or more, thousands where it is quoted", slip)


@fact("2.2 f", "saved images have the range of images: a value of 0.5 is a grey of 191")
def saved_range(submission: Submission) -> None:
    counts = submission.saved_greys()
    check(counts.shape == (256,), f"{tuple(counts.shape)} counts", "256 of greys")
    inside = counts[17:240]  # without margins
    found = 17 + int(inside.argmax()) if inside.any() else int((counts.cumsum(0) * 2 >= counts.sum()).int().argmax())
    slips = {"images saved dark: [-1, 1] was cut to [0, 1], not scaled": 127, "images saved black": 0}
    expect(found, 191.0, slips, where="grey", scale=6, rel=0)  # a JPEG changes it a little


def check_length(betas: Tensor, timesteps: int) -> None:
    """Raises `Wrong` where there are not T betas, each strictly between 0 and 1."""
    slips = {timesteps + 1: "0 .. T has T + 1 entries", timesteps - 1: "T points have T - 1 ratios"}
    slip = slips.get(len(betas), "")
    check(len(betas) == timesteps, f"{len(betas)} betas", f"{timesteps}, one per timestep", slip)
    inside = ((betas > 0) & (betas < 1)).all()
    check(inside, f"betas from {betas.min():.4g} to {betas.max():.4g}", "all strictly between 0 and 1")


@fact("2.3", "the linear schedule runs from beta_start to beta_end")
def linear_schedule(submission: Submission) -> None:
    betas = submission.schedule("linear", beta_start=1e-4, beta_end=0.02, timesteps=1000)
    check_length(betas, 1000)
    expect(betas, torch.linspace(1e-4, 0.02, 1000), where="beta")


@fact("2.3", "the cosine schedule is that of the paper, cut off at 0.999", "Nichol and Dhariwal 2021, Eq. 17")
def cosine_schedule(submission: Submission) -> None:
    betas = submission.schedule("cosine", timesteps=1000)

    def cosine(s=0.008, power=2, least=0.0, most=0.999, steps=1000, inverted=False) -> Tensor:
        x = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        alphas_bar = torch.cos((x + s) / (1 + s) * math.pi / 2) ** power
        before, after = (alphas_bar[1:], alphas_bar[:-1]) if inverted else (alphas_bar[:-1], alphas_bar[1:])
        return (1 - after / before).clamp(least, most)

    short = cosine(steps=999)
    slips = {
        "cut off at 0.9999, not at 0.999": cosine(most=0.9999),
        "cut off at 0.0001 below and at 0.9999, not only at 0.999": cosine(least=1e-4, most=0.9999),
        "cut off at 0.02, as if it were linear": cosine(most=0.02),
        "cut off at 0.0001 below and at 0.02, as if it were linear": cosine(least=1e-4, most=0.02),
        "offset s left out": cosine(s=0.0),
        "the cosine is not squared": cosine(power=1),
        "the last beta is appended: T - 1 ratios of T values": torch.cat((short, short[-1:])),
        "the first beta is put before T - 1 ratios of T values": torch.cat((short[:1], short)),
    }
    low = betas.min()
    if len(betas) == 1000 and (low <= 0 or (betas == low).sum() > 900):
        slip = "the ratio of alpha-bar is inverted: a step divides the later one by the earlier one"
        looks_like = slip if betas.max() <= 1e-3 else ""
        raise Wrong(f"betas from {low:.4g} to {betas.max():.4g}", "4.1e-05 to 0.999", looks_like)
    cut = len(betas) != 1000 or betas[-1] <= 0.99999
    check(cut, f"beta {betas[-1]:.6f} at t = 999", "0.999", "clip missing at 0.999")
    check_length(betas, 1000)
    allowed = {"cut off at 0.0001 below, which changes the first steps only": cosine(least=1e-4)}
    allowed["cut off at 0.001 below, which changes the first steps only"] = cosine(least=1e-3)
    expect(betas, cosine(), slips, allowed, where="beta", rel=5e-4, scale=3e-7)


@fact("2.3", "the sigmoid schedule is Eq. 10, between beta_start and beta_end", "Eq. 10")
def sigmoid_schedule(submission: Submission) -> None:
    for start, end, timesteps in ((1e-4, 0.02, 1000), (1e-3, 0.3, 60)):
        betas = submission.schedule("sigmoid", beta_start=start, beta_end=end, timesteps=timesteps)
        check_length(betas, timesteps)
        fixed = start == 1e-3 and betas[-1] < 0.1
        slip = "beta_start and beta_end are overwritten"
        check(not fixed, f"beta {betas[-1]:.4g} at the end", "nearly beta_end, 0.3", slip)
        inside = betas[0] >= start and betas[-1] <= end
        slip, found = "the sigmoid schedule's range: not scaled to beta_start .. beta_end", f"{betas[0]:.4g} to"
        check(inside, f"betas from {found} {betas[-1]:.4g}", f"within {start:g} and {end:g}", slip)
        # The sheet leaves open how t runs from 0 to T, and solutions choose s_limit: any sigmoid over -s .. s is right.
        shares, quarter = (betas - start) / (end - start), timesteps // 4
        x = torch.logit(shares.clamp(1e-9, 1 - 1e-9))
        steps = torch.arange(timesteps, dtype=torch.float64)
        for grid in (steps / (timesteps - 1), steps / timesteps, (steps + 1) / timesteps):
            limit = (-x[quarter] / (1 - 2 * grid[quarter])).item()
            if limit > 0 and ((torch.sigmoid(limit * (2 * grid - 1)) - shares).abs() < 2e-4).all():
                slip = "the sigmoid schedule's range: no S remains of the sigmoid"
                check(3 <= limit <= 20, f"s_limit {limit:.3g}", "3 to 20", slip)
                break
        else:
            slip = "the sigmoid schedule's range: 0 .. 1 in place of -s .. s" if abs(x[0]) < 0.01 else ""
            found = f"beta {betas[timesteps // 2]:.4g} in the middle, {betas[0]:.4g} at first"
            raise Wrong(found, f"{(start + end) / 2:.4g} and nearly {start:g}", slip)


@fact("2.3", "x_T keeps less than 1% of the image with the settings of the program", advice=True)
def end_of_the_process(submission: Submission) -> None:
    submission.load("main")
    plain = submission.outline["settings"]
    if plain is None:
        return  # they can't be read off the source; the schedules are judged above
    steps, name, ends = plain["timesteps"], plain["name"], dict(zip(("beta_start", "beta_end"), plain["ends"]))
    left = torch.cumprod(1 - submission.schedule(name, timesteps=steps, **ends), 0)[-1].item()
    keeps = f"x_T keeps {left:.0%} of the image at T = {steps}: samples start from noise the model never saw"
    check(left <= 0.01, f"alpha-bar {left:.3f} at T = {steps} of the {name} schedule", "below 0.01", keeps)


def labels(value: int, count: int = 64) -> Tensor:
    return torch.full((count,), value)


def conditional(submission: Submission, value: int, training: bool = False, seed: int = 0) -> dict:
    """What a conditional U-Net with p_uncond = 0.5 makes of the same image 64 times, all of one class."""
    if not submission.takes("model", "Unet.forward", "classes"):
        raise Missing("Unet.forward takes no classes")
    x, t = random_image().repeat(64, 1, 1, 1), torch.full((64,), 3)
    return submission.forward(x, t, labels(value), p_uncond=0.5, training=training, seed=seed)


def fraction_equal(submission: Submission, **options) -> float:
    """The fraction of images for which two classes give the same."""
    x = random_image().repeat(64, 1, 1, 1)
    a, b = (like(x, conditional(submission, value, **options)["out"]) for value in (0, 1))
    check(a.isfinite().all() and b.isfinite().all(), "infinite numbers", "finite ones")
    return ((a - b).flatten(1).abs().amax(1) <= 1e-5 * a.abs().max()).double().mean().item()


@fact("2.4 a", "the class changes what the U-Net predicts")
def class_matters(submission: Submission) -> None:
    equal = fraction_equal(submission)
    check(equal < 1, "the same output for two classes", "different ones", "the class embedding reaches no block")


@fact("2.4 a", "labels are dropped in training mode only")
def class_in_eval(submission: Submission) -> None:
    equal = fraction_equal(submission)
    found = f"{equal:.0%} of the labels without effect in eval mode"
    check(equal == 0, found, "0%", "labels are dropped in eval mode")


@fact("2.4 a", "in training each label is dropped by itself, with probability p_uncond")
def class_dropped(submission: Submission) -> None:
    fractions = [fraction_equal(submission, training=True, seed=seed) for seed in range(6)]
    slip = "dropped for the batch as a whole"
    check(set(fractions) != {0.0, 1.0}, "all labels of a batch dropped, or none", "each by itself", slip)
    slips = {"labels are never dropped": 0.0, "labels are always dropped": 1.0}
    where = "fraction of dropped labels for p_uncond = 0.5:"
    expect(sum(fractions) / len(fractions), 0.5, slips, where=where, scale=0.1, rel=0)
    slip = "a fixed number of labels is dropped"
    check(len(set(fractions)) > 1, "the same fraction in every batch", "a random one", slip)


@fact("2.4 a", "the labels that were given stay as they are")
def class_kept(submission: Submission) -> None:
    slip = "dropped in place: the caller's labels are lost"
    for training in (True, False):
        kept = torch.equal(conditional(submission, 2, training)["classes"], labels(2))
        check(kept, "labels that were changed by the call", "the ones given", slip)


@fact("2.4 b", "p_losses hands the labels to the U-Net")
def loss_classes(submission: Submission) -> None:
    if not submission.takes("diffusion", "Diffusion.p_losses", "classes"):
        raise Missing("p_losses takes no classes")
    given = [0, 1, 2, 3]
    loss = submission.loss({"without": 0.2}, images(0.0), torch.full((4,), 3), classes=torch.tensor(given))
    seen = loss["calls"][0]["labels"] if loss["calls"] else None
    check(seen == given, f"labels {seen} in the U-Net", f"{given}", "labels are lost on the way")


def guided(submission: Submission, w: float, through: str = "p_sample") -> tuple[float, dict]:
    """(the noise that a step of guidance scale `w` takes for predicted, what `Submission.guide` says).

    The U-Net predicts 1 with a class and 0.2 without. A step at t = 0 has no noise and is linear in the prediction.
    """
    seen = submission.guide(w, through)
    if not seen["scaled"] and through == "p_sample":
        raise Missing("neither p_sample, sample nor Diffusion takes a guidance scale")
    if not seen["calls"]:
        raise Missing("a process of the one step t = 0 never calls the U-Net")
    if "step" in seen:
        return (seen["step"].double().mean() / seen["unit"].double().mean()).item(), seen
    x_t, out = (like(images(0.0), seen[name]).double() for name in ("start", "images"))
    eps = (x_t - (1 - ONE_BETA) ** 0.5 * out) / ONE_BETA**0.5
    return eps.median().item(), seen


@fact("2.4 b", "w = 0 is the conditional prediction", "Eq. 11")
def guidance_zero(submission: Submission) -> None:
    slips = {
        "w = 0 is the unconditional prediction": 0.2,
        "the guidance scale is fed with p_uncond": 1 + 0.8 * P_UNCOND,
    }
    expect(guided(submission, 0.0)[0], 1.0, slips, where="prediction", rel=0.02)


@fact("2.4 b", "guidance is (1 + w) eps(c) - w eps", "Eq. 11")
def guidance_equation(submission: Submission) -> None:
    slips = {
        "guidance has no effect": 1.0,
        "the class has no effect: always unconditional": 0.2,
        "the guidance scale is fed with p_uncond": 1 + 0.8 * P_UNCOND,
        "w in place of 1 + w: eps + w (eps(c) - eps)": 0.2 + 3 * 0.8,
        "Eq. 11 with w and 1 + w exchanged": 3 * 1 - 4 * 0.2,
        "conditional and unconditional prediction exchanged": 4 * 0.2 - 3 * 1,
        "(1 - w) eps(c) + w eps": -2 * 1 + 3 * 0.2,
        "the unconditional prediction is added": 4 * 1 + 3 * 0.2,
    }
    found = guided(submission, 3.0)[0]
    fixed = abs(found - 3.4) > 0.02 and abs(found - 1) > 0.02 and abs(found - guided(submission, 5.0)[0]) < 1e-3
    if fixed and abs(found - 0.2) > 0.02 and abs(found - 1 - 0.8 * P_UNCOND) > 0.02:
        slips = {fixed_at(found): found}
    expect(found, 4 * 1 - 3 * 0.2, slips, where="prediction for w = 3, of 1 and 0.2,", rel=0.02)


def fixed_at(eps: float) -> str:
    return f"the guidance scale is fixed, at w = {(eps - 1) / 0.8:.3g}"


@fact("2.4 b", "sample hands the guidance scale to its steps", "Eq. 11")
def guidance_in_sample(submission: Submission) -> None:
    if not submission.takes("diffusion", "Diffusion.sample", "classes"):
        raise Missing("sample takes no classes")
    (eps, seen), (other, _) = (guided(submission, w, "sample") for w in (3.0, 5.0))
    if abs(eps - other) > 1e-3:
        return  # whether it is the right one: `guidance_equation`
    slips = {
        "guidance has no effect": 1.0,
        "the class has no effect: always unconditional": 0.2,
        "the guidance scale is fed with p_uncond": 1 + 0.8 * P_UNCOND,
    }
    if not seen["scaled"] and min(abs(eps - 1), abs(eps - 0.2)) < 0.02:
        raise Missing("neither sample nor Diffusion takes a guidance scale")
    slips[fixed_at(eps)] = eps
    expect(eps, 4 * 1 - 3 * 0.2, slips, where="prediction for w = 3 as for w = 5", rel=0.02)


@fact("2.4 b", "both predictions of a step come from one call of the U-Net", advice=True)
def guidance_calls(submission: Submission) -> None:
    calls, slip = (
        len(guided(submission, 3.0)[1]["calls"]),
        "the model is called twice where one batch of double size does",
    )
    check(calls == 1, f"{calls} calls", "1, of a batch twice as large", slip)


def verdict(submission: Submission, name: str) -> dict:
    """What a fact says of a submission.

    "right", "wrong", "differs" (not as written, as good), "advice", "missing", "fails" (an error in its code), "hangs".
    """
    fact = FACTS[name]
    result = {"fact": name, "task": fact.task, "statement": fact.statement, "equation": fact.equation}
    result.update(verdict="right", found="", expected="", looks_like="")
    try:
        submission.begin()
        fact.check(submission)
    except Missing as error:
        result.update(verdict="missing", found=str(error))
    except Failed as error:
        result.update(verdict=error.verdict, found=str(error))
    except Wrong as wrong:
        kind = "advice" if fact.advice else "differs" if wrong.differs else "wrong"
        result.update(verdict=kind, found=wrong.found, expected=wrong.expected, looks_like=wrong.looks_like)
    except Exception as error:  # its answer was of another type or shape
        result.update(verdict="fails", found=f"an answer that can't be judged: {type(error).__name__}: {error}")
    return result
