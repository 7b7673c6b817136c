"""What is true of every right solution of the exercise, 2.1 to 2.4, whoever wrote it: the facts of `check`.

A fact calls a solution by the names of the handed-out skeleton and compares what comes out with a closed form. It knows
what common slips look like. As a program of its own this file runs a submission,

    python -m ex2.grading.facts FOLDER FACT ...

and prints a line of JSON for each fact.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ex2.grading.submission import (
    BETAS,
    PREFIXES,
    TIMES,
    Arguments,
    Missing,
    OnCpu,
    Solution,
    Stub,
    T,
    importing_from,
    seed_all,
)


@dataclass
class Wrong(Exception):
    """What was found in place of what was expected, and what that looks like."""

    found: str
    expected: str
    looks_like: str = ""


@dataclass(frozen=True)
class Fact:
    """A statement with its sub-task and equation, and the function that raises where it isn't true of a solution."""

    task: str
    statement: str
    equation: str
    check: Callable[[Solution], None]
    advice: bool = False  # good to follow, but a solution without it is not wrong


ROOT = Path(__file__).resolve().parents[2]  # has our modules of the same names
FACTS: dict[str, Fact] = {}
UNIFORM = "uniform noise (torch.rand), Gaussian is asked for (torch.randn)"


def fact(task: str, statement: str, equation: str = "", advice: bool = False):
    """Puts a function into `FACTS`."""

    def register(check):
        FACTS[check.__name__] = Fact(task, statement, equation, check, advice)
        return check

    return register


def hold(true, found: str, expected: str, looks_like: str = "") -> None:
    """Raises `Wrong` where something is not true."""
    if not true:
        raise Wrong(found, expected, looks_like)


def expect(found, expected, slips: Mapping[str, object] | None = None, *, where="", rel=2e-3, scale=1e-6) -> None:
    """Raises `Wrong` where a figure, or one of several (at `TIMES`), is not as expected.

    Args:
        slips: what it looks like -> the figure that such a slip would give.
        where: what the figure is.  rel, scale: relative tolerance, and what is added to it for small figures.
    """
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))

    def close(value) -> bool:
        value = torch.as_tensor(value, dtype=torch.float64)
        return bool(((found - value).abs() <= rel * value.abs() + scale).all())

    if found.shape == expected.shape and close(expected):
        return
    looks_like = next((text for text, value in (slips or {}).items() if close(value)), "")
    if found.ndim:
        worst = int((found - expected).abs().argmax())
        raise Wrong(f"{where} {found[worst]:.4g} at t = {worst}", f"{expected[worst]:.4g}", looks_like)
    raise Wrong(f"{where} {found:.4g}".strip(), f"{expected:.4g}", looks_like)


def expect_gaussian(noise: Tensor, what: str) -> None:
    """Raises `Wrong` unless the noise has the shape of a Gaussian: excess kurtosis 0 (-1.2 for uniform numbers)."""
    values = noise.double().flatten()
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean().item() - 3
    looks_like = UNIFORM if kurtosis < -1 else ""
    hold(not abs(kurtosis) > 0.3, f"{what} with excess kurtosis {kurtosis:.2f}", "0, of a Gaussian", looks_like)


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


def random_image(size: int = 8) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@fact("2.1", "the U-Net gives an image of the size it gets, finite")
def unet_shape(solution: Solution) -> None:
    x = random_image(16).repeat(2, 1, 1, 1)
    out = solution.forward(solution.unet(), x, torch.tensor([0, 7]))
    hold(out.shape == x.shape, f"shape {tuple(out.shape)}", f"{tuple(x.shape)}")
    hold(out.isfinite().all(), "infinite numbers", "finite ones")


@fact("2.1", "the U-Net gets the time, each image its own")
def unet_time(solution: Solution) -> None:
    model, x = solution.unet().eval(), random_image(16).expand(2, -1, -1, -1)
    early, late, both = (solution.forward(model, x, torch.tensor(t)) for t in ([1, 1], [500, 500], [1, 500]))
    differ = not torch.allclose(early, late, atol=1e-6)
    hold(differ, "the same output at t = 1 and t = 500", "different ones", "the time embedding reaches no block")
    own = torch.allclose(both, torch.stack((early[0], late[1])), atol=1e-3 * late.abs().max().item())
    hold(own, "an output that depends on the times of other images", "one for each image")


@fact("2.2 a, c", "q_sample keeps sqrt(alpha-bar_t) of the image", "Eq. 4")
def forward_signal(solution: Solution) -> None:
    tab = tables()
    slips = {
        "root of alpha-bar left out": tab.alphas_bar,
        "root of alpha-bar taken twice": tab.alphas_bar**0.25,
        "alpha_t of one step in place of the product": tab.alphas.sqrt(),
        "alpha-bar of the step before": tab.before.sqrt(),
        "the image is not scaled at all": torch.ones(T),
    }
    found = solution.q_sample(images(1.0, T), TIMES, images(0.0, T)).flatten(1).mean(1)
    expect(found, tab.alphas_bar.sqrt(), slips, where="factor of the image")


@fact("2.2 a, c", "q_sample adds sqrt(1 - alpha-bar_t) of the noise", "Eq. 4")
def forward_noise(solution: Solution) -> None:
    tab = tables()
    slips = {
        "root of 1 - alpha-bar left out": 1 - tab.alphas_bar,
        "root of 1 - alpha-bar taken twice": (1 - tab.alphas_bar) ** 0.25,
        "beta_t of one step": tab.betas.sqrt(),
        "the noise is not scaled at all": torch.ones(T),
        "1 - sqrt(alpha-bar)": 1 - tab.alphas_bar.sqrt(),
    }
    found = solution.q_sample(images(0.0, T), TIMES, images(1.0, T)).flatten(1).mean(1)
    expect(found, (1 - tab.alphas_bar).sqrt(), slips, where="factor of the noise")


@fact("2.2 c", "q_sample draws Gaussian noise, new for each image", "Eq. 4")
def forward_draws(solution: Solution) -> None:
    torch.manual_seed(0)
    noise = solution.q_sample(images(0.0, 256), torch.full((256,), T - 1)) / math.sqrt(1 - tables().alphas_bar[-1])
    shared, slip = torch.allclose(noise[0], noise[1]), "noise drawn without the batch's shape"
    hold(not shared, "the same noise for all images of a batch", "new noise for each", slip)
    expect_standard_normal(noise, "the noise")


def step_factors(solution: Solution, x: float, eps: float) -> Tensor:
    """What p_sample makes of an image and of a prediction of one value, (T,), by its difference to 0 at equal noise."""
    steps = ((solution.p_sample(images(x), eps, t), solution.p_sample(images(0.0), 0.0, t)) for t in range(T))
    return torch.stack([(step - without).double().mean() / (x or eps) for step, without in steps])


@fact("2.2 a, d", "p_sample scales x_t by 1 / sqrt(alpha_t)", "Eq. 8")
def reverse_image(solution: Solution) -> None:
    tab = tables()
    slips = {
        "root of alpha_t left out": 1 / tab.alphas,
        "root of alpha_t taken twice": tab.alphas**-0.25,
        "alpha-bar_t in place of alpha_t": tab.alphas_bar**-0.5,
        "sqrt(alpha_t) multiplied, not divided": tab.alphas.sqrt(),
        "x_t is not scaled at all": torch.ones(T),
    }
    expect(step_factors(solution, 0.1, 0.0), tab.alphas**-0.5, slips, where="factor of x_t")


@fact("2.2 a, d", "p_sample subtracts beta_t / sqrt(1 - alpha-bar_t) of the predicted noise", "Eq. 8")
def reverse_prediction(solution: Solution) -> None:
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
    expect(step_factors(solution, 0.0, 0.1), right, slips, where="factor of the predicted noise")


@fact("2.2 a, d", "p_sample adds Gaussian noise of variance beta_t", "Eq. 8")
def reverse_noise(solution: Solution) -> None:
    tab = tables()
    noise = [solution.p_sample(images(0.0, 256), 0.0, t).double() for t in range(1, T)]
    if noise[-1].std() > 0:
        expect_gaussian(noise[-1], "noise")
    found = torch.stack([torch.zeros((), dtype=torch.float64), *(values.std() for values in noise)])
    slips = {
        "sigma^2 is the posterior variance, Eq. 8 asks for beta_t": tab.posterior.sqrt(),
        "the posterior variance without its root": tab.posterior,
        "root of beta_t left out": tab.betas,
        "no noise at all": torch.zeros(T),
        "standard normal noise, not scaled": torch.ones(T),
        "the noise is divided by sqrt(alpha_t) as well": (tab.betas / tab.alphas).sqrt(),
    }
    expected = tab.betas.sqrt()
    for values in (expected, *slips.values()):
        values[0] = 0
        values[1] = values[1] if found[1] else 0  # whether there is any at t = 1: `reverse_first_noise`
    expect(found, expected, slips, where="standard deviation of the noise", rel=0.02)


@fact("2.2 d", "p_sample adds no noise at t = 0, and only there", "Eq. 8")
def reverse_first_noise(solution: Solution) -> None:
    noisy = [not torch.equal(*(solution.p_sample(images(0.5), 0.1, t, seed) for seed in (0, 1))) for t in (0, 1)]
    hold(not noisy[0], "noise at t = 0", "none: z = 0 there", "noise is added to the finished image")
    slip = "the last step is taken for t = 1, counted as in the paper"
    hold(noisy[1], "no noise at t = 1", "noise of variance beta_1", slip)


@fact("2.2 d", "p_losses: l2 is the mean squared error, l1 the mean absolute one", "Eq. 9")
def loss_values(solution: Solution) -> None:
    noise, t = images(1.0, 8), torch.full((8,), 4)
    noise[4:] = 3
    x_t, size = solution.q_sample(images(0.3, 8), t, noise), noise.numel()
    for kind, right, of_input in (("l2", 5.0, x_t.square().mean()), ("l1", 2.0, x_t.abs().mean())):
        slips = {
            "summed over the pixels, not averaged": right * size,
            "the root of the mean squared error": right**0.5,
            "the root of the sum": (right * size) ** 0.5,
            "summed over each image": right * size / 8,
            "the loss is to x_t, not to the noise": of_input,
            "the loss is to x_t and summed": of_input * size,
            "the loss is to x_t, the root of its sum": (of_input * size) ** 0.5,
            "the other of the two losses": 7.0 - right,
        }
        found = solution.loss(Stub(), images(0.3, 8), t, kind, noise=noise)
        expect(found, right, slips, where=f"{kind} loss of a predictor of zeros", rel=1e-3)


@fact("2.2 d", "p_losses compares the prediction with the noise", "Eq. 9")
def loss_target(solution: Solution) -> None:
    x_zero, noise = images(0.3, 8), random_image().repeat(8, 1, 1, 1)
    predicted = {"": noise, "the target is x_0": x_zero, "the target is x_t": None}

    def loss(value) -> float:
        stub = Stub(lambda x, t: x if value is None else value)
        return solution.loss(stub, x_zero, torch.full((8,), 4), noise=noise)

    losses = {name: loss(value) for name, value in predicted.items()}
    looks_like = next((name for name in predicted if losses[name] < 1e-6), "")
    hold(losses[""] <= 1e-6, f"loss {losses['']:.4g} where the noise is predicted exactly", "0", looks_like)


@fact("2.2 d", "p_losses draws Gaussian noise, the same for x_t and for the target", "Eq. 9")
def loss_draws(solution: Solution) -> None:
    t, factor = torch.full((256,), 4), math.sqrt(1 - tables().alphas_bar[4])
    torch.manual_seed(0)
    loss = solution.loss(Stub(lambda x, t: x / factor), images(0.0, 256), t)
    looks_like = "noise is drawn twice" if abs(loss - 2) < 0.2 else ""
    hold(loss <= 1e-3, f"loss {loss:.4g} of a predictor that reads the noise off x_t", "0", looks_like)
    found = solution.loss(Stub(), images(0.0, 256), t)
    expect(found, 1.0, {UNIFORM: 1 / 3}, where="loss of a predictor of zeros", rel=0.05)


@fact("2.2 b", "sample visits t = T-1, ..., 0, each once", "Algorithm 2")
def sample_times(solution: Solution) -> None:
    model = Stub()
    solution.sample(model)
    times = [int(torch.as_tensor(call.t).flatten()[0]) for call in model.calls]
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
    hold(times == expected, found, "9, 8, 7 ... 0", looks_like)


@fact("2.2 b", "sample starts from standard normal noise", "Algorithm 2")
def sample_start(solution: Solution) -> None:
    model = Stub()
    solution.sample(model, count=128)
    expect_standard_normal(model.calls[0].x, "x_T")


@fact("2.2 b", "sample returns the images, without a gradient", "Algorithm 2")
def sample_result(solution: Solution) -> None:
    result = solution.sample(Stub(), count=4)
    hold(tuple(result.shape) == (4, 3, 8, 8), f"shape {tuple(result.shape)}", "(4, 3, 8, 8)")
    slip = "@torch.no_grad() is missing: all steps stay in memory"
    hold(not result.requires_grad, "images with a gradient", "none", slip)


@fact("2.2 b", "samples of a Gaussian have its spread, with the best possible predictor", "Eqs. 4, 8")
def sample_spread(solution: Solution) -> None:
    betas, spread = torch.linspace(5e-4, 0.1, 200), 0.25
    tab = tables(betas)
    variance = tab.alphas_bar * spread**2 + 1 - tab.alphas_bar  # of x_t
    shrink = ((1 - tab.alphas_bar).sqrt() / variance).float()
    model = Stub(lambda x, t: shrink[torch.as_tensor(t).flatten()[0]] * x)
    expected = torch.ones(())
    for t in reversed(range(len(betas))):
        expected = (1 - tab.betas[t] / variance[t]) ** 2 / tab.alphas[t] * expected + (tab.betas[t] if t else 0)
    found = solution.sample(model, betas, count=64).double().std()
    expect(found, expected.sqrt(), where="standard deviation of samples", rel=0.04)


@fact("2.2 e", "the test loop judges in eval mode, without gradients")
def test_loop(solution: Solution) -> None:
    function = solution.get("main", "test")
    source = inspect.getsource(function)
    body = re.sub(r'""".*?"""|#[^\n]*', "", source, flags=re.DOTALL)
    if re.fullmatch(r"\s*def test\(.*?\).*?:\s*(pass|\.\.\.)?\s*", body, re.DOTALL):
        raise Missing("test is an empty stub")
    model = Stub().train()
    loader = DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), batch_size=4)
    given = {"model": model, "testloader": loader, "diffusor": solution.diffusion(), "args": Arguments(), "epoch": 0}
    try:
        function(**solution.arguments(function, given))
    except Exception:  # what comes after the losses may need flags that only the solution knows
        if not model.calls:
            raise
    hold(model.calls, "a test loop that never calls the model", "losses of the test set")
    before = ".eval()" in inspect.getsource(solution.module("main")).replace(source, "")  # the caller may have done it
    in_training = any(call.training for call in model.calls) and not before
    slip = "model.eval() is missing: labels are dropped in the test"
    hold(not in_training, "the model in training mode", "eval mode", slip)
    hold(not any(call.grad for call in model.calls), "gradients", "none", "torch.no_grad() is missing")


@fact("2.2 f", "saved images have the range of images: a value of 0.5 is a grey of 191")
def saved_range(solution: Solution) -> None:
    function = solution.get("main", "sample_and_save_images")
    diffusor = solution.diffusion(torch.linspace(1e-4, 0.2, 100))  # some pick out steps of T = 100
    optional = {"classes": torch.zeros(2, dtype=torch.long), "guidance_scale": 0.0}
    kind = solution.call(diffusor.sample, optional, model=Stub(), image_size=8, batch_size=2, channels=3)
    is_list = isinstance(kind, (list, tuple))
    scaled = torch.as_tensor(np.asarray(kind[-1] if is_list else kind)).min() >= 0  # some scale to [0, 1] in `sample`

    def half(*args, **kwargs):
        """Grey images with a black and a white row, as the solution's own `sample` returns images."""
        made = torch.full((2, 3, 8, 8) if is_list else tuple(kind.shape), 0.75 if scaled else 0.5)
        made[..., 0, :], made[..., 1, :] = 0.0 if scaled else -1.0, 1.0
        return [made for _ in kind] if is_list else made if torch.is_tensor(kind) else made.numpy()

    diffusor.sample = half
    with tempfile.TemporaryDirectory() as folder:
        given = {"n_images": 2, "diffusor": diffusor, "model": Stub(), "store_path": folder + os.sep, "image_size": 8}
        function(**solution.arguments(function, {**given, "reverse_transform": reverse_transform}))
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg"))
        if not files:
            raise Missing("sample_and_save_images saves no PNG or JPEG file in its store_path")
        pixels = np.asarray(Image.open(files[-1]).convert("L"))
    values, counts = np.unique(pixels[(pixels > 16) & (pixels < 240)], return_counts=True)  # without margins
    found = float(values[counts.argmax()]) if len(values) else float(np.median(pixels))
    slips = {"images saved dark: [-1, 1] was cut to [0, 1], not scaled": 127, "images saved black": 0}
    expect(found, 191.0, slips, where="grey", scale=6, rel=0)  # a JPEG changes it a little


def reverse_transform(image: Tensor) -> Image.Image:
    """As the skeleton has it, an argument of `sample_and_save_images` in some solutions."""
    array = ((image.squeeze() + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return Image.fromarray(array)


def check_length(betas: Tensor, timesteps: int) -> None:
    """Raises `Wrong` where there are not T betas, each strictly between 0 and 1."""
    slip = "0 .. T has T + 1 entries"
    hold(len(betas) == timesteps, f"{len(betas)} betas", f"{timesteps}, one per timestep", slip)
    inside = ((betas > 0) & (betas < 1)).all()
    hold(inside, f"betas from {betas.min():.4g} to {betas.max():.4g}", "all strictly between 0 and 1")


@fact("2.3", "the linear schedule runs from beta_start to beta_end")
def linear_schedule(solution: Solution) -> None:
    betas = solution.schedule("linear", beta_start=1e-4, beta_end=0.02, timesteps=1000)
    check_length(betas, 1000)
    expect(betas, torch.linspace(1e-4, 0.02, 1000), where="beta")


@fact("2.3", "the cosine schedule is that of the paper, cut off at 0.999", "Nichol and Dhariwal 2021, Eq. 17")
def cosine_schedule(solution: Solution) -> None:
    betas = solution.schedule("cosine", timesteps=1000)

    def cosine(s: float = 0.008, power: int = 2, least: float = 0.0, most: float = 0.999) -> Tensor:
        x = torch.linspace(0, 1, 1001, dtype=torch.float64)
        alphas_bar = torch.cos((x + s) / (1 + s) * math.pi / 2) ** power
        return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(least, most)

    cut = len(betas) != 1000 or betas[-1] <= 0.99999
    hold(cut, f"beta {betas[-1]:.6f} at t = 999", "0.999", "clip missing at 0.999")
    check_length(betas, 1000)
    slips = {
        "cut off at 0.9999, not at 0.999": cosine(most=0.9999),
        "cut off at 0.0001 below and at 0.9999, not only at 0.999": cosine(least=1e-4, most=0.9999),
        "cut off at 0.0001 below, which changes the first steps": cosine(least=1e-4),
        "cut off at 0.02, as if it were linear": cosine(least=1e-4, most=0.02),
        "offset s left out": cosine(s=0.0),
        "the cosine is not squared": cosine(power=1),
    }
    expect(betas, cosine(), slips, where="beta", rel=2e-3, scale=3e-7)


@fact("2.3", "the sigmoid schedule is Eq. 10, between beta_start and beta_end", "Eq. 10")
def sigmoid_schedule(solution: Solution) -> None:
    for start, end, timesteps in ((1e-4, 0.02, 1000), (1e-3, 0.3, 60)):
        betas = solution.schedule("sigmoid", beta_start=start, beta_end=end, timesteps=timesteps)
        check_length(betas, timesteps)
        fixed = start == 1e-3 and betas[-1] < 0.1
        slip = "beta_start and beta_end are overwritten"
        hold(not fixed, f"beta {betas[-1]:.4g} at the end", "nearly beta_end, 0.3", slip)
        inside = betas[0] >= start and betas[-1] <= end
        slip, found = "the sigmoid schedule's range: not scaled to beta_start .. beta_end", f"{betas[0]:.4g} to"
        hold(inside, f"betas from {found} {betas[-1]:.4g}", f"within {start:g} and {end:g}", slip)
        # The sheet leaves open how t runs from 0 to T, and solutions choose s_limit: any sigmoid over -s .. s is right.
        shares, quarter = (betas - start) / (end - start), timesteps // 4
        x = torch.logit(shares.clamp(1e-9, 1 - 1e-9))
        steps = torch.arange(timesteps, dtype=torch.float64)
        for grid in (steps / (timesteps - 1), steps / timesteps, (steps + 1) / timesteps):
            limit = (-x[quarter] / (1 - 2 * grid[quarter])).item()
            if limit > 0 and ((torch.sigmoid(limit * (2 * grid - 1)) - shares).abs() < 2e-4).all():
                slip = "the sigmoid schedule's range: no S remains of the sigmoid"
                hold(3 <= limit <= 20, f"s_limit {limit:.3g}", "3 to 20", slip)
                break
        else:
            slip = "the sigmoid schedule's range: 0 .. 1 in place of -s .. s" if abs(x[0]) < 0.01 else ""
            found = f"beta {betas[timesteps // 2]:.4g} in the middle, {betas[0]:.4g} at first"
            raise Wrong(found, f"{(start + end) / 2:.4g} and nearly {start:g}", slip)


@fact("2.3", "x_T keeps less than 1% of the image with the settings of the program", advice=True)
def end_of_the_process(solution: Solution) -> None:
    found = settings_of_main(solution.folder)
    if found is None:
        return  # they can't be read off the source; the schedules are judged above
    timesteps, name, ends = found
    left = torch.cumprod(1 - solution.schedule(name, timesteps=timesteps, **ends), 0)[-1].item()
    keeps = f"x_T keeps {left:.0%} of the image at T = {timesteps}: samples start from noise the model never saw"
    hold(left <= 0.01, f"alpha-bar {left:.3f} at T = {timesteps} of the {name} schedule", "below 0.01", keeps)


def settings_of_main(folder: Path) -> tuple[int, str, dict] | None:
    """(default of --timesteps, name of the schedule, beta_start and beta_end) of a main file; None if not plain there.

    The schedule is the one in the function that the call of `Diffusion` names, as the skeleton has it.
    """
    path = next((folder / f"{prefix}main.py" for prefix in PREFIXES if (folder / f"{prefix}main.py").is_file()), None)
    tree = ast.walk(ast.parse(path.read_bytes())) if path else ()
    steps, used, schedules = None, None, {}
    for node in tree:
        flags = [a.value for a in node.args if isinstance(a, ast.Constant)] if isinstance(node, ast.Call) else []
        if "--timesteps" in flags:
            steps = next((k.value for k in node.keywords if k.arg == "default"), None)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Diffusion" and len(node.args) > 1:
            used = getattr(node.args[1], "id", None)
        name = getattr(node, "name", None) or getattr(next(iter(getattr(node, "targets", ())), None), "id", None)
        if isinstance(node, (ast.Assign, ast.FunctionDef)):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            calls = [call for call in calls if str(getattr(call.func, "id", "")).endswith("_beta_schedule")]
            if len(calls) == 1:
                schedules[name] = calls[0]
    call = schedules.get(used)
    if call is None or not isinstance(steps, ast.Constant) or not isinstance(steps.value, int):
        return None
    kind = call.func.id.replace("_beta_schedule", "")
    ends = [a.value for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, float)]
    if kind == "cosine":
        return steps.value, kind, {}
    return (steps.value, kind, {"beta_start": ends[0], "beta_end": ends[1]}) if len(ends) == 2 else None


def labels(value: int, count: int = 64) -> Tensor:
    return torch.full((count,), value)


def conditional(solution: Solution, p_uncond: float) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, the same image 64 times, its times)."""
    if not solution.takes(solution.get("model", "Unet").forward, "classes"):
        raise Missing("Unet.forward takes no classes")
    return solution.unet(p_uncond), random_image().repeat(64, 1, 1, 1), torch.full((64,), 3)


def share_equal(a: Tensor, b: Tensor) -> float:
    """The share of images that are the same in two batches."""
    return ((a - b).flatten(1).abs().amax(1) < 1e-5 * a.abs().max()).double().mean().item()


@fact("2.4 a", "the class changes what the U-Net predicts")
def class_matters(solution: Solution) -> None:
    model, x, t = conditional(solution, 0.0)
    equal = share_equal(*(solution.forward(model.eval(), x, t, labels(value)) for value in (0, 1)))
    hold(equal < 1, "the same output for two classes", "different ones", "the class embedding reaches no block")


@fact("2.4 a", "labels are dropped in training mode only")
def class_in_eval(solution: Solution) -> None:
    model, x, t = conditional(solution, 0.5)
    equal = share_equal(*(solution.forward(model.eval(), x, t, labels(value)) for value in (0, 1)))
    found = f"{equal:.0%} of the labels without effect in eval mode"
    hold(equal == 0, found, "0%", "labels are dropped in eval mode")


@fact("2.4 a", "in training each label is dropped by itself, with probability p_uncond")
def class_dropped(solution: Solution) -> None:
    model, x, t = conditional(solution, 0.5)
    shares = []
    for seed in range(6):
        outputs = []
        for value in (0, 1):
            seed_all(seed)
            outputs.append(solution.forward(model.train(), x, t, labels(value)))
        shares.append(share_equal(*outputs))
    slip = "dropped for the batch as a whole"
    hold(set(shares) != {0.0, 1.0}, "all labels of a batch dropped, or none", "each by itself", slip)
    slips = {"labels are never dropped": 0.0, "labels are always dropped": 1.0}
    where = "share of dropped labels for p_uncond = 0.5:"
    expect(sum(shares) / len(shares), 0.5, slips, where=where, scale=0.1, rel=0)
    slip = "a fixed number of labels is dropped"
    hold(len(set(shares)) > 1, "the same share in every batch", "a random one", slip)


@fact("2.4 a", "the labels that were given stay as they are")
def class_kept(solution: Solution) -> None:
    model, x, t = conditional(solution, 0.5)
    given, slip = labels(2), "dropped in place: the caller's labels are lost"
    for mode in (True, False):
        solution.forward(model.train(mode), x, t, given)
        hold(torch.equal(given, labels(2)), "labels that were changed by the call", "the ones given", slip)


@fact("2.4 b", "p_losses hands the labels to the U-Net")
def loss_classes(solution: Solution) -> None:
    if not solution.takes(solution.get("diffusion", "Diffusion").p_losses, "classes"):
        raise Missing("p_losses takes no classes")
    model, given = Stub(without=0.2), torch.arange(4)
    solution.loss(model, images(0.0), torch.full((4,), 3), classes=given)
    seen = model.calls[0].labels
    seen = None if seen is None else seen.reshape(-1).tolist()
    hold(seen == given.tolist(), f"labels {seen} in the U-Net", f"{given.tolist()}", "labels are lost on the way")


def guided(solution: Solution, w: float) -> tuple[float, int]:
    """(the noise that a step of guidance scale `w` takes for predicted, calls of the network).

    The U-Net predicts 1 with a class and 0.2 without. A step at t = 0 has no noise and is linear in the prediction.
    """
    given = {"classes": torch.zeros(4, dtype=torch.long), "t": torch.zeros(4, dtype=torch.long), "t_index": 0}
    model, kind = Stub(without=0.2), solution.get("diffusion", "Diffusion")
    if solution.takes(kind.p_sample, "guidance_scale") or solution.takes(kind, "guidance_scale"):
        diffusor = solution.diffusion(guidance_scale=w, class_free_guidance=True)
        step = solution.call(diffusor.p_sample, model=model, x=images(0.0), guidance_scale=w, **given)
        return (step.double().mean() / solution.p_sample(images(0.0), 1.0, 0).double().mean()).item(), len(model.calls)
    if not solution.takes(kind.sample, "guidance_scale"):
        raise Missing("neither p_sample, sample nor Diffusion takes a guidance scale")
    betas = torch.tensor([0.3])  # a single step, from the noise that the U-Net saw to the images
    out = solution.sample(model, betas, guidance_scale=w, classes=given["classes"], conditional=True)
    eps = (model.calls[0].x[:4].double() - (1 - 0.3) ** 0.5 * out.double()) / 0.3**0.5
    return eps.median().item(), len(model.calls)


@fact("2.4 b", "w = 0 is the conditional prediction", "Eq. 11")
def guidance_zero(solution: Solution) -> None:
    expect(guided(solution, 0.0)[0], 1.0, {"w = 0 is the unconditional prediction": 0.2}, where="prediction", rel=0.02)


@fact("2.4 b", "guidance is (1 + w) eps(c) - w eps", "Eq. 11")
def guidance_equation(solution: Solution) -> None:
    slips = {
        "guidance has no effect": 1.0,
        "the class has no effect: always unconditional": 0.2,
        "w in place of 1 + w: eps + w (eps(c) - eps)": 0.2 + 3 * 0.8,
        "Eq. 11 with w and 1 + w exchanged": 3 * 1 - 4 * 0.2,
        "conditional and unconditional prediction exchanged": 4 * 0.2 - 3 * 1,
        "(1 - w) eps(c) + w eps": -2 * 1 + 3 * 0.2,
        "the unconditional prediction is added": 4 * 1 + 3 * 0.2,
    }
    expect(guided(solution, 3.0)[0], 4 * 1 - 3 * 0.2, slips, where="prediction for w = 3, of 1 and 0.2,", rel=0.02)


@fact("2.4 b", "both predictions of a step come from one call of the U-Net", advice=True)
def guidance_calls(solution: Solution) -> None:
    calls, slip = guided(solution, 3.0)[1], "the model is called twice where one batch of double size does"
    hold(calls == 1, f"{calls} calls", "1, of a batch twice as large", slip)


def verdict(solution: Solution, name: str) -> dict:
    """What a fact says of a solution: "right", "wrong", "missing", or "fails" where its code raises an error."""
    fact = FACTS[name]
    result = {"fact": name, "task": fact.task, "statement": fact.statement, "equation": fact.equation}
    result.update(verdict="right", found="", expected="", looks_like="")
    try:
        fact.check(solution)
    except Missing as error:
        result.update(verdict="missing", found=str(error))
    except Wrong as wrong:
        kind = "advice" if fact.advice else "wrong"
        result.update(verdict=kind, found=wrong.found, expected=wrong.expected, looks_like=wrong.looks_like)
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(solution.folder))]
        where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
        message = str(error).strip().split("\n")[0][:200]
        result.update(verdict="fails", found=f"{type(error).__name__}{where}: {message}")
    if OnCpu.used:
        solution.adapted.add("the code insists on a GPU: it is put on the CPU")
    return {**result, "adapted": sorted(solution.adapted)}


def main(folder: str, *names: str) -> None:
    """Judges a solution in this process. Python refuses connections, and what the solution prints is not shown."""
    token = sys.stdin.readline().strip()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def refuse(*args, **kwargs):
        raise OSError("no network while a solution is checked")

    socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
    torch.set_num_threads(2)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, Path.cwd())]  # ours
    solution = Solution(Path(folder))
    print(f"{token}{{}}", file=out, flush=True)  # torch is there: the time limit of the first fact begins
    with importing_from(solution.folder):
        for name in names:
            print(f"{token}{json.dumps(verdict(solution, name))}", file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
