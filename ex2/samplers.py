"""Samplers: ways from noise to an image (2.2 b), some of them with few network calls.

A sampler is a generator over the timesteps of a `Diffusion` process, from the last to the first. It yields (index, x_t,
x_zero estimate) at each of them, and in the end (-1, sample, sample). To add one, write a function and name it in
`SAMPLERS`; if it has an argument `eta`, it is stochastic where that is above 0.

Args of every sampler:
    process: the `Diffusion`, on a subsequence of its timesteps.
    predict: (x_t, index) -> `Estimate`, one network call.
    x: x_T, the noise to start from (B, C, H, W).
    draw: () -> new noise like x.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """The network's prediction at x_t: the noise in it, and the image without it, both (B, C, H, W)."""

    t: Tensor  # (B,), all equal to the index
    eps: Tensor
    x_zero: Tensor


Trajectory = Iterator[tuple[int, Tensor, Tensor]]


def ddpm(process, predict, x: Tensor, draw) -> Trajectory:
    """Ancestral sampling, Algorithm 2 of Ho et al. 2020: every step is Eq. 8."""
    for index in reversed(range(process.timesteps)):
        t, eps, x_zero = predict(x, index)
        yield index, x, x_zero
        x = process.ddpm_step(x, t, eps, draw() if index > 0 else torch.zeros_like(x))
    yield -1, x, x


def ddim(process, predict, x: Tensor, draw, eta: float = 0.0) -> Trajectory:
    """The non-Markovian sampler, deterministic for eta = 0; Song et al. 2021 (https://arxiv.org/abs/2010.02502)."""
    for index in reversed(range(process.timesteps)):
        _, eps, x_zero = predict(x, index)
        yield index, x, x_zero
        x = ddim_step(process, index, eps, x_zero, draw, eta)
    yield -1, x, x


def dpmpp_2m(process, predict, x: Tensor, draw, eta: float = 0.0) -> Trajectory:
    """DPM-Solver++(2M), second order; Lu et al. 2022, Alg. 2 (https://arxiv.org/abs/2211.01095), in another variable.

    The first step has no estimate before it, and the last one returns its own: those two are of first order.
    """
    x_zero_before = None
    for index in reversed(range(process.timesteps)):
        t, eps, x_zero = predict(x, index)
        yield index, x, x_zero
        mean = x_zero
        if index > 0 and x_zero_before is not None:
            mean = second_order_x_zero(process, index, x_zero, x_zero_before)
            eps = process.predict_eps(x, t, mean)
        x = ddim_step(process, index, eps, mean, draw, eta)
        x_zero_before = x_zero
    yield -1, x, x


def heun(process, predict, x: Tensor, draw) -> Trajectory:
    """Heun's method, second order; Karras et al. 2022, Alg. 1 (https://arxiv.org/abs/2206.00364).

    It takes two network calls a step, but for the last one.
    """
    for index in reversed(range(process.timesteps)):
        _, eps, x_zero = predict(x, index)
        yield index, x, x_zero
        x_next = ddim_step(process, index, eps, x_zero, draw)
        if index > 0:
            _, eps_end, x_zero_end = predict(x_next, index - 1)
            x_next = heun_step(process, index, x, (eps, x_zero), (eps_end, x_zero_end))
        x = x_next
    yield -1, x, x


def ipndm(process, predict, x: Tensor, draw) -> Trajectory:
    """iPNDM: DDIM's step with the noise of the last four; Zhang and Chen 2023 (https://arxiv.org/abs/2204.13902).

    The first steps have fewer estimates before them, and the last one returns its own.
    """
    last = []
    for index in reversed(range(process.timesteps)):
        t, eps, x_zero = predict(x, index)
        yield index, x, x_zero
        last = [eps, *last[:3]]
        if index > 0:
            eps = sum(factor * e for factor, e in zip(ADAMS_BASHFORTH[len(last) - 1], last))
            x_zero = process.predict_x_zero(x, t, eps)
        x = ddim_step(process, index, eps, x_zero, draw)
    yield -1, x, x


ADAMS_BASHFORTH = (  # of order 1 to 4: factors of the estimates, the latest first
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun, "ipndm": ipndm}


def takes_eta(name: str) -> bool:
    """Whether the stochasticity of a sampler can be chosen."""
    return "eta" in inspect.signature(SAMPLERS[name]).parameters


def check_sampling(sampler: str, eta: float, guidance_interval: tuple[float, float]) -> None:
    """Raises a ValueError for an unknown sampler, a fraction outside 0 .. 1, or an eta that the sampler ignores."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not 0 <= eta <= 1 or (eta > 0 and not takes_eta(sampler)):
        able = " and ".join(filter(takes_eta, SAMPLERS))
        raise ValueError(f"eta {eta:g} for {sampler}: only {able} take one, up to 1; or give --eta 0")
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(
            f"guidance_interval takes two fractions of T, 0 <= first <= last <= 1, got {guidance_interval}"
        )


def check_classes(classes: Tensor | Sequence[int], batch_size: int, null_class: int | None) -> Tensor:
    """`classes` as a tensor (B,); a ValueError unless there is one whole number for each image."""
    classes = torch.as_tensor(classes)
    most, known = (
        (math.inf, "")
        if null_class is None
        else (null_class, f" within 0 .. {null_class - 1}, or {null_class} for none")
    )
    whole = not (classes.is_floating_point() or classes.dtype == torch.bool)
    if not whole or classes.shape != (batch_size,) or not ((classes >= 0) & (classes <= most)).all():
        raise ValueError(f"classes must be {batch_size} labels{known}, got {classes.tolist()}")
    return classes


def ddim_step(process, index: int, eps: Tensor, x_zero: Tensor, draw, eta: float = 0.0) -> Tensor:
    """x_{t-1} from the two estimates that make up x_t; Song et al. 2021, Eq. 12. At index 0 it is x_zero.

    It is the first-order step of DPM-Solver++ as well (Lu et al. 2022, Eq. 9).

    eta: 0 is the ODE, 1 ancestral with the posterior variance (Eq. 16 of Song et al.).
    """
    alphas_bar_prev = process.alphas_bar_prev[index]
    variance = eta**2 * process.posterior_variance[index]
    direction = (1 - alphas_bar_prev - variance).clamp(min=0).sqrt()
    x = alphas_bar_prev.sqrt() * x_zero + direction * eps
    return x + variance.sqrt() * draw() if eta > 0 and index > 0 else x


def angle(process, index: int) -> float:
    """The angle whose cosine and sine are the factors of x_zero and eps in x_t (Salimans and Ho 2022)."""
    alpha_bar = process.alphas_bar_exact[index]
    return math.atan2(math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar))


def second_order_x_zero(process, index: int, x_zero: Tensor, x_zero_before: Tensor) -> Tensor:
    """x_zero in the middle of the next step's angle, extrapolated from the last two estimates. (B, C, H, W).

    Lu et al. take log-SNR for the angle. On it the steps grow towards the image: an extrapolation over more than twice
    the distance of the estimates made samples up to 35% too wide (docs/samplers.md).

    Args:
        x_zero: the estimate at `index`.
        x_zero_before: the estimate at the timestep before it, index + 1.
    """
    after, now, before = (angle(process, i) for i in (index - 1, index, index + 1))
    return x_zero + (after - now) / (2 * (now - before)) * (x_zero - x_zero_before)


def heun_step(process, index: int, x: Tensor, *ends: tuple[Tensor, Tensor]) -> Tensor:
    """x_{t-1} from x_t by the mean slope of both ends, each (eps, x_zero): at `index`, and at index - 1.

    The slope is dx/dangle for x = cos(angle) x_zero + sin(angle) eps. Karras et al. step over sigma / alpha =
    tan(angle): 20,000 where cosine schedules start, all digits would be lost.
    """
    slopes = []
    for i, (eps, x_zero) in zip((index, index - 1), ends):
        slopes.append(process.sqrt_alphas_bar[i] * eps - process.sqrt_one_minus_alphas_bar[i] * x_zero)
    return x + (angle(process, index - 1) - angle(process, index)) * (slopes[0] + slopes[1]) / 2
