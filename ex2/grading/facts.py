"""What is true of every right solution of the exercise, 2.1 to 2.4, whoever wrote it: the facts of `check`.

A fact asks a submission, which runs in another process, for the results of its functions. It compares them with a
closed form, and knows what common slips look like. What comes back may be anything: a fact holds only where it fits.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from ex2.grading.adapter import Missing
from ex2.grading.submission import BETAS, ONE_BETA, P_UNCOND, T
from ex2.grading.verdicts import UNIFORM, Fact, Wrong, check, expect, expect_gaussian, expect_standard_normal

FACTS: dict[str, Fact] = {}
TIMES = torch.arange(T)
POSTERIOR = "sigma^2 is the posterior variance, which footnote 2 of the sheet calls as good as beta_t"
SIGMOID = "the sigmoid schedule's range: "


def tables(betas: Tensor) -> SimpleNamespace:
    """What Eqs. 4 and 8 are made of, in float64."""
    betas = betas.double()
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    return SimpleNamespace(
        betas=betas, alphas=1 - betas, abar=abar, before=before, posterior=betas * (1 - before) / (1 - abar)
    )


TAB = tables(BETAS)


def fact(task: str, statement: str, equation: str = "", advice: bool = False):
    """Puts a function into `FACTS`."""

    def register(function):
        FACTS[function.__name__] = Fact(task, statement, equation, function, advice)
        return function

    return register


def images(value: float, count: int = 4) -> Tensor:
    """Images (count, 3, 8, 8) of one value."""
    return torch.full((count, 3, 8, 8), value)


def random_images(count: int, size: int = 8) -> Tensor:
    """One image of noise, `count` times."""
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).repeat(count, 1, 1, 1)


def like(x: Tensor, found: Tensor) -> Tensor:
    """What was found, where it has the shape of x."""
    check(found.shape == x.shape, f"shape {tuple(found.shape)}", f"{tuple(x.shape)}")
    return found


def q_sample(submission, x_zero: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    return submission.diffuse("q_sample", {"x_zero": x_zero, "t": t, "noise": noise})["result"]


def p_sample(submission, x: Tensor, eps: float, t: int, seed: int = 0) -> Tensor:
    """x_{t-1} of images x where the network predicts `eps` everywhere."""
    given = {"model": "", "x": x, "t": torch.full((len(x),), t), "t_index": t}
    return submission.diffuse("p_sample", given, {"shift": eps}, seed=seed)["result"]


def sample(submission, stub: dict, count: int = 4, betas: Tensor = BETAS, **given) -> dict:
    """The whole reverse process, with `result`, images (count, 3, 8, 8)."""
    sizes = {"image_size": 8, "batch_size": count, "channels": 3}
    return submission.diffuse("sample", {"model": "", **sizes, **given}, stub, betas)


def loss(submission, stub: dict, x_zero: Tensor, loss_type: str = "l2", noise=None) -> float:
    """The loss at t = 4."""
    t = torch.full((len(x_zero),), 4)
    given = {"model": "", "x_zero": x_zero, "t": t, "noise": noise, "loss_type": loss_type}
    return submission.diffuse("p_losses", given, stub)["result"].item()


@fact("2.1", "the U-Net gives an image of the size it gets, finite")
def unet_shape(submission) -> None:
    x = random_images(2, 16)
    out = like(x, submission.forward(x, torch.tensor([0, 7]))["out"])
    check(out.isfinite().all(), "infinite numbers", "finite ones")


@fact("2.1", "the U-Net gets the time, each image its own")
def unet_time(submission) -> None:
    x = random_images(2, 16)
    early, late, both = (like(x, submission.forward(x, torch.tensor(t))["out"]) for t in ([1, 1], [500, 500], [1, 500]))
    differ = not torch.allclose(early, late, atol=1e-6)
    check(differ, "the same output at t = 1 and t = 500", "different ones", "the time embedding reaches no block")
    own = torch.allclose(both, torch.stack((early[0], late[1])), atol=1e-3 * late.abs().max().item())
    check(own, "an output that depends on the times of other images", "one for each image")


@fact("2.2 a, c", "q_sample keeps sqrt(alpha-bar_t) of the image", "Eq. 4")
def forward_signal(submission) -> None:
    slips = {
        "root of alpha-bar left out": TAB.abar,
        "root of alpha-bar taken twice": TAB.abar**0.25,
        "alpha_t of one step in place of the product": TAB.alphas.sqrt(),
        "alpha-bar of the step before": TAB.before.sqrt(),
        "the image has the factor of the noise": (1 - TAB.abar).sqrt(),
        "the image is not scaled at all": torch.ones(T),
    }
    found = q_sample(submission, images(1.0, T), TIMES, images(0.0, T)).flatten(1).mean(1)
    expect(found, TAB.abar.sqrt(), slips, "factor of the image")


@fact("2.2 a, c", "q_sample adds sqrt(1 - alpha-bar_t) of the noise", "Eq. 4")
def forward_noise(submission) -> None:
    slips = {
        "root of 1 - alpha-bar left out": 1 - TAB.abar,
        "root of 1 - alpha-bar taken twice": (1 - TAB.abar) ** 0.25,
        "beta_t of one step": TAB.betas.sqrt(),
        "the noise is not scaled at all": torch.ones(T),
        "1 - sqrt(alpha-bar)": 1 - TAB.abar.sqrt(),
    }
    found = q_sample(submission, images(0.0, T), TIMES, images(1.0, T)).flatten(1).mean(1)
    expect(found, (1 - TAB.abar).sqrt(), slips, "factor of the noise")


@fact("2.2 c", "q_sample draws Gaussian noise, new for each image", "Eq. 4")
def forward_draws(submission) -> None:
    noise = q_sample(submission, images(0.0, 256), torch.full((256,), T - 1)) / math.sqrt(1 - TAB.abar[-1])
    shared = torch.allclose(noise[0], noise[1])
    slip = "noise drawn without the batch's shape"
    check(not shared, "the same noise for all images of a batch", "new noise for each", slip)
    expect_standard_normal(noise, "the noise")


def step_factors(submission, x: float, eps: float) -> Tensor:
    """What p_sample makes of an image and of a prediction of one value, (T,), by its difference to 0 at equal noise."""
    inputs = (images(x), eps), (images(0.0), 0.0)
    steps = ([like(images(x), p_sample(submission, *given, t)) for given in inputs] for t in range(T))
    return torch.stack([(step - without).double().mean() / (x or eps) for step, without in steps])


@fact("2.2 a, d", "p_sample scales x_t by 1 / sqrt(alpha_t)", "Eq. 8")
def reverse_image(submission) -> None:
    slips = {
        "root of alpha_t left out": 1 / TAB.alphas,
        "root of alpha_t taken twice": TAB.alphas**-0.25,
        "alpha-bar_t in place of alpha_t": TAB.abar**-0.5,
        "sqrt(alpha_t) multiplied, not divided": TAB.alphas.sqrt(),
        "x_t is not scaled at all": torch.ones(T),
    }
    expect(step_factors(submission, 0.1, 0.0), TAB.alphas**-0.5, slips, "factor of x_t")


@fact("2.2 a, d", "p_sample subtracts beta_t / sqrt(1 - alpha-bar_t) of the predicted noise", "Eq. 8")
def reverse_prediction(submission) -> None:
    right = -TAB.betas / (1 - TAB.abar).sqrt() / TAB.alphas.sqrt()
    slips = {
        "root of 1 - alpha-bar left out": -TAB.betas / (1 - TAB.abar) / TAB.alphas.sqrt(),
        "alpha_t in place of alpha-bar_t": -TAB.betas / TAB.betas.sqrt() / TAB.alphas.sqrt(),
        "not divided by sqrt(alpha_t)": right * TAB.alphas.sqrt(),
        "divided by sqrt(alpha_t) twice": right / TAB.alphas.sqrt(),
        "root of alpha_t taken twice": right * TAB.alphas**0.25,
        "the noise is added, not subtracted": -right,
        "alpha_t in place of beta_t": right * TAB.alphas / TAB.betas,
    }
    expect(step_factors(submission, 0.0, 0.1), right, slips, "factor of the predicted noise")


@fact("2.2 a, d", "p_sample adds Gaussian noise of variance beta_t", "Eq. 8")
def reverse_noise(submission) -> None:
    noise = [p_sample(submission, images(0.0, 256), 0.0, t).double() for t in range(2, T)]  # 1: `reverse_first_noise`
    if noise[-1].std() > 0:
        expect_gaussian(noise[-1], "noise")
    found, late = torch.tensor([0.0, 0.0, *(values.std() for values in noise)]), TIMES > 1
    slips = {
        "the posterior variance without its root": late * TAB.posterior,
        "root of beta_t left out": late * TAB.betas,
        "no noise at all": torch.zeros(T),
        "standard normal noise, not scaled": late,
        "the noise is divided by sqrt(alpha_t) as well": late * (TAB.betas / TAB.alphas).sqrt(),
    }
    allowed = {POSTERIOR: late * TAB.posterior.sqrt()}
    expect(found, late * TAB.betas.sqrt(), slips, "standard deviation of the noise", rel=0.02, allowed=allowed)


@fact("2.2 d", "p_sample adds no noise at t = 0, and only there", "Eq. 8")
def reverse_first_noise(submission) -> None:
    noisy = [not torch.equal(*(p_sample(submission, images(0.5), 0.1, t, seed) for seed in (0, 1))) for t in (0, 1)]
    check(not noisy[0], "noise at t = 0", "none: z = 0 there", "noise is added to the finished image")
    slip = "the last step is taken for t = 1, counted as in the paper"
    check(noisy[1], "no noise at t = 1", "noise of variance beta_1", slip)


@fact("2.2 d", "p_losses: l2 is the mean squared error, l1 the mean absolute one", "Eq. 9")
def loss_values(submission) -> None:
    noise = images(1.0, 8)
    noise[4:] = 3
    x_t, size = q_sample(submission, images(0.3, 8), torch.full((8,), 4), noise), noise.numel()
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
        found = loss(submission, {}, images(0.3, 8), kind, noise)
        expect(found, right, slips, f"{kind} loss of a predictor of zeros", rel=1e-3)


@fact("2.2 d", "p_losses compares the prediction with the noise", "Eq. 9")
def loss_target(submission) -> None:
    x_zero, noise = images(0.3, 8), random_images(8)
    predicted = {"": {"shift": noise}, "the target is x_0": {"shift": x_zero}, "the target is x_t": {"scale": 1.0}}
    losses = {name: loss(submission, stub, x_zero, noise=noise) for name, stub in predicted.items()}
    looks_like = next((name for name, value in losses.items() if value < 1e-6), "")
    check(losses[""] <= 1e-6, f"loss {losses['']:.4g} where the noise is predicted exactly", "0", looks_like)


@fact("2.2 d", "p_losses draws Gaussian noise, the same for x_t and for the target", "Eq. 9")
def loss_draws(submission) -> None:
    found = loss(submission, {"scale": 1 / math.sqrt(1 - TAB.abar[4])}, images(0.0, 256))
    looks_like = "noise is drawn twice" if abs(found - 2) < 0.2 else ""
    check(found <= 1e-3, f"loss {found:.4g} of a predictor that reads the noise off x_t", "0", looks_like)
    found = loss(submission, {}, images(0.0, 256))
    expect(found, 1.0, {UNIFORM: 1 / 3}, "loss of a predictor of zeros", rel=0.05)


@fact("2.2 b", "sample visits t = T-1, ..., 0, each once", "Algorithm 2")
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


@fact("2.2 b", "sample starts from standard normal noise", "Algorithm 2")
def sample_start(submission) -> None:
    expect_standard_normal(sample(submission, {}, count=128)["start"], "x_T")


@fact("2.2 b", "sample returns the images, without a gradient", "Algorithm 2")
def sample_result(submission) -> None:
    result = sample(submission, {})
    like(images(0.0), result["result"])
    slip = "@torch.no_grad() is missing: all steps stay in memory"
    check(result["gradient"] is False, "images with a gradient", "none", slip)


@fact("2.2 b", "samples of a Gaussian have its spread, with the best possible predictor", "Eqs. 4, 8")
def sample_spread(submission) -> None:
    betas, spread = torch.linspace(5e-4, 0.1, 200), 0.25
    tab = tables(betas)
    variance = tab.abar * spread**2 + 1 - tab.abar  # of x_t

    def spread_of(added: Tensor) -> Tensor:
        """The standard deviation of samples, with so much variance added at each step."""
        expected = torch.ones(())
        for t in reversed(range(len(betas))):
            expected = (1 - tab.betas[t] / variance[t]) ** 2 / tab.alphas[t] * expected + (added[t] if t else 0)
        return expected.sqrt()

    found = sample(submission, {"scale": ((1 - tab.abar).sqrt() / variance).float()}, 64, betas)["result"]
    allowed = {POSTERIOR: spread_of(tab.posterior)}
    where = "standard deviation of samples"
    expect(found.double().std(), spread_of(tab.betas), {}, where, rel=0.04, allowed=allowed)


@fact("2.2 e", "the test loop judges in eval mode, without gradients")
def test_loop(submission) -> None:
    calls = submission.run_test()["calls"]
    check(calls, "a test loop that never calls the model", "losses of the test set")
    elsewhere = submission.outline["eval_elsewhere"]  # the caller may have done it
    slip = "model.eval() is missing: labels are dropped in the test"
    check(elsewhere or not any(call["training"] for call in calls), "the model in training mode", "eval mode", slip)
    check(not any(call["gradients"] for call in calls), "gradients", "none", "torch.no_grad() is missing")


@fact("2.2 e", "a Fréchet distance (FID) is of at least 100 images", advice=True)
def fid_images(submission) -> None:
    submission.load("main")
    count = submission.outline["fid_images"]
    slip = f"FID on {count} images: most of it is the error of so few"
    check(count is None or count >= 100, f"{count} images", "100 or more, thousands where it is quoted", slip)


@fact("2.2 f", "saved images have the range of images: a value of 0.5 is a grey of 191")
def saved_range(submission) -> None:
    counts = submission.saved_greys()
    check(counts.shape == (256,), f"{tuple(counts.shape)} counts", "256 of greys")
    inside = counts[17:240]  # without margins
    found = 17 + int(inside.argmax()) if inside.any() else int((counts.cumsum(0) * 2 >= counts.sum()).int().argmax())
    slips = {"images saved dark: [-1, 1] was cut to [0, 1], not scaled": 127, "images saved black": 0}
    expect(found, 191.0, slips, "grey", rel=0, scale=6)  # a JPEG changes it a little


def check_length(betas: Tensor, timesteps: int) -> None:
    """Raises `Wrong` where there are not T betas, each strictly between 0 and 1."""
    slips = {timesteps + 1: "0 .. T has T + 1 entries", timesteps - 1: "T points have T - 1 ratios"}
    found = f"{len(betas)} betas"
    check(len(betas) == timesteps, found, f"{timesteps}, one per timestep", slips.get(len(betas), ""))
    inside = ((betas > 0) & (betas < 1)).all()
    check(inside, f"betas from {betas.min():.4g} to {betas.max():.4g}", "all strictly between 0 and 1")


@fact("2.3", "the linear schedule runs from beta_start to beta_end")
def linear_schedule(submission) -> None:
    betas = submission.schedule("linear", beta_start=1e-4, beta_end=0.02, timesteps=1000)
    check_length(betas, 1000)
    expect(betas, torch.linspace(1e-4, 0.02, 1000), {}, "beta")


def cosine(s=0.008, power=2, least=0.0, most=0.999, steps=1000) -> Tensor:
    """Betas of the cosine schedule."""
    x = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = torch.cos((x + s) / (1 + s) * math.pi / 2) ** power
    return (1 - abar[1:] / abar[:-1]).clamp(least, most)


@fact("2.3", "the cosine schedule is that of the paper, cut off at 0.999", "Nichol and Dhariwal 2021, Eq. 17")
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
        "the first beta is put before T - 1 ratios of T values": torch.cat((short[:1], short)),
    }
    allowed = {
        "cut off at 0.0001 below, which changes the first steps only": cosine(least=1e-4),
        "cut off at 0.001 below, which changes the first steps only": cosine(least=1e-3),
    }
    low, high = betas.min(), betas.max()
    if len(betas) == 1000 and (low <= 0 or (betas == low).sum() > 900):
        slip = "the ratio of alpha-bar is inverted: a step divides the later one by the earlier one"
        raise Wrong(f"betas from {low:.4g} to {high:.4g}", "4.1e-05 to 0.999", slip if high <= 1e-3 else "")
    cut = len(betas) != 1000 or betas[-1] <= 0.99999
    check(cut, f"beta {betas[-1]:.6f} at t = 999", "0.999", "clip missing at 0.999")
    check_length(betas, 1000)
    expect(betas, cosine(), slips, "beta", rel=5e-4, scale=3e-7, allowed=allowed)


@fact("2.3", "the sigmoid schedule is Eq. 10, between beta_start and beta_end", "Eq. 10")
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
            raise Wrong(found, f"{(start + end) / 2:.4g} and nearly {start:g}, with s of 3 to 20", slip)


@fact("2.3", "x_T keeps less than 1% of the image with the settings of the program", advice=True)
def end_of_the_process(submission) -> None:
    submission.load("main")
    plain = submission.outline["settings"]
    if plain is None:
        return  # they can't be read off the source; the schedules are judged above
    steps, name, ends = plain["timesteps"], plain["name"], dict(zip(("beta_start", "beta_end"), plain["ends"]))
    left = torch.cumprod(1 - submission.schedule(name, timesteps=steps, **ends), 0)[-1].item()
    slip = f"x_T keeps {left:.0%} of the image at T = {steps}: samples start from noise the model never saw"
    check(left <= 0.01, f"alpha-bar {left:.3f} at T = {steps} of the {name} schedule", "below 0.01", slip)


def conditional(submission, value: int, training: bool = False, seed: int = 0) -> dict:
    """What a conditional U-Net with p_uncond = 0.5 makes of the same image 64 times, all of one class."""
    if not submission.takes("model", "Unet.forward", "classes"):
        raise Missing("Unet.forward takes no classes")
    t, classes = torch.full((64,), 3), torch.full((64,), value)
    return submission.forward(random_images(64), t, classes, p_uncond=0.5, training=training, seed=seed)


def fraction_equal(submission, **options) -> float:
    """The fraction of images for which two classes give the same."""
    a, b = (like(random_images(64), conditional(submission, value, **options)["out"]) for value in (0, 1))
    check(a.isfinite().all() and b.isfinite().all(), "infinite numbers", "finite ones")
    return ((a - b).flatten(1).abs().amax(1) <= 1e-5 * a.abs().max()).double().mean().item()


@fact("2.4 a", "the class changes what the U-Net predicts")
def class_matters(submission) -> None:
    equal = fraction_equal(submission)
    check(equal < 1, "the same output for two classes", "different ones", "the class embedding reaches no block")


@fact("2.4 a", "labels are dropped in training mode only")
def class_in_eval(submission) -> None:
    equal = fraction_equal(submission)
    found = f"{equal:.0%} of the labels without effect in eval mode"
    check(equal == 0, found, "0%", "labels are dropped in eval mode")


@fact("2.4 a", "in training each label is dropped by itself, with probability p_uncond")
def class_dropped(submission) -> None:
    fractions = [fraction_equal(submission, training=True, seed=seed) for seed in range(6)]
    slip = "dropped for the batch as a whole"
    check(set(fractions) != {0.0, 1.0}, "all labels of a batch dropped, or none", "each by itself", slip)
    slips = {"labels are never dropped": 0.0, "labels are always dropped": 1.0}
    expect(sum(fractions) / 6, 0.5, slips, "fraction of dropped labels for p_uncond = 0.5:", rel=0, scale=0.1)
    slip = "a fixed number of labels is dropped"
    check(len(set(fractions)) > 1, "the same fraction in every batch", "a random one", slip)


@fact("2.4 a", "the labels that were given stay as they are")
def class_kept(submission) -> None:
    slip = "dropped in place: the caller's labels are lost"
    for training in (True, False):
        kept = torch.equal(conditional(submission, 2, training)["classes"], torch.full((64,), 2))
        check(kept, "labels that were changed by the call", "the ones given", slip)


@fact("2.4 b", "p_losses hands the labels to the U-Net")
def loss_classes(submission) -> None:
    if not submission.takes("diffusion", "Diffusion.p_losses", "classes"):
        raise Missing("p_losses takes no classes")
    classes = torch.arange(4)
    given = {"model": "", "x_zero": images(0.0), "t": torch.full((4,), 3), "loss_type": "l2", "classes": classes}
    calls = submission.diffuse("p_losses", given, {"without": 0.2})["calls"]
    seen = calls[0]["labels"] if calls else None
    check(seen == classes.tolist(), f"labels {seen} in the U-Net", f"{classes.tolist()}", "labels are lost on the way")


FED = {"the guidance scale is fed with p_uncond": 1 + 0.8 * P_UNCOND}
UNGUIDED = {"guidance has no effect": 1.0, "the class has no effect: always unconditional": 0.2, **FED}


def guided(submission, w: float, through: str = "p_sample") -> tuple[float, int, bool]:
    """(noise that a step of guidance scale w takes for predicted, calls of the U-Net, whether a function takes w).

    The U-Net predicts 1 with a class and 0.2 without. A step at t = 0 has no noise and is linear in the prediction.
    """
    names, black = ("Diffusion", f"Diffusion.{through}"), images(0.0)
    scaled = any(submission.takes("diffusion", name, "guidance_scale") for name in names)
    if through == "p_sample" and not scaled:
        found = guided(submission, w, "sample")
        if not found[2]:
            raise Missing("neither p_sample, sample nor Diffusion takes a guidance scale")
        return found
    classes = {"classes": torch.zeros(4, dtype=torch.long), "guidance_scale": w, "p_uncond": P_UNCOND}
    if through == "p_sample":
        given = {"model": "", "x": black, "t": torch.zeros(4, dtype=torch.long), "t_index": 0, **classes}
        seen = submission.diffuse("p_sample", given, {"without": 0.2})
        eps = seen["result"].double().mean() / p_sample(submission, black, 1.0, 0).double().mean()
    else:
        seen = sample(submission, {"without": 0.2}, 4, torch.tensor([ONE_BETA]), **classes)
        if not seen["calls"]:
            raise Missing("a process of the one step t = 0 never calls the U-Net")
        x_t, out = (like(black, seen[name]).double() for name in ("start", "result"))
        eps = ((x_t - (1 - ONE_BETA) ** 0.5 * out) / ONE_BETA**0.5).median()
    return eps.item(), len(seen["calls"]), scaled


def fixed_at(eps: float) -> dict:
    """What a prediction looks like that is the same for every w."""
    return {**UNGUIDED, f"the guidance scale is fixed, at w = {(eps - 1) / 0.8:.3g}": eps}


@fact("2.4 b", "w = 0 is the conditional prediction", "Eq. 11")
def guidance_zero(submission) -> None:
    slips = {"w = 0 is the unconditional prediction": 0.2, **FED}
    expect(guided(submission, 0.0)[0], 1.0, slips, "prediction", rel=0.02)


@fact("2.4 b", "guidance is (1 + w) eps(c) - w eps", "Eq. 11")
def guidance_equation(submission) -> None:
    slips = {
        **UNGUIDED,
        "w in place of 1 + w: eps + w (eps(c) - eps)": 0.2 + 3 * 0.8,
        "Eq. 11 with w and 1 + w exchanged": 3 * 1 - 4 * 0.2,
        "conditional and unconditional prediction exchanged": 4 * 0.2 - 3 * 1,
        "(1 - w) eps(c) + w eps": -2 * 1 + 3 * 0.2,
        "the unconditional prediction is added": 4 * 1 + 3 * 0.2,
    }
    right, eps = 4 * 1 - 3 * 0.2, guided(submission, 3.0)[0]
    if abs(eps - right) > 0.02 and abs(eps - guided(submission, 5.0)[0]) < 1e-3:
        slips = fixed_at(eps)
    expect(eps, right, slips, "prediction for w = 3, of 1 and 0.2,", rel=0.02)


@fact("2.4 b", "sample hands the guidance scale to its steps", "Eq. 11")
def guidance_in_sample(submission) -> None:
    if not submission.takes("diffusion", "Diffusion.sample", "classes"):
        raise Missing("sample takes no classes")
    (eps, _, scaled), (other, *_) = (guided(submission, w, "sample") for w in (3.0, 5.0))
    if abs(eps - other) > 1e-3:
        return  # whether it is the right one: `guidance_equation`
    if not scaled and min(abs(eps - 1), abs(eps - 0.2)) < 0.02:
        raise Missing("neither sample nor Diffusion takes a guidance scale")
    expect(eps, 4 * 1 - 3 * 0.2, fixed_at(eps), "prediction for w = 3 as for w = 5", rel=0.02)


@fact("2.4 b", "both predictions of a step come from one call of the U-Net", advice=True)
def guidance_calls(submission) -> None:
    calls = guided(submission, 3.0)[1]
    slip = "the model is called twice where one batch of double size does"
    check(calls == 1, f"{calls} calls", "1, of a batch twice as large", slip)
