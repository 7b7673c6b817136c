"""Verdicts: a fact holds of a submission, or says what was found, what was expected, and what that looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNIFORM = "uniform noise (torch.rand), Gaussian is asked for (torch.randn)"


class Failed(Exception):
    """The submission's code raised an error, or its process ended."""

    verdict = "fails"


class Hangs(Failed):
    """It took too long."""

    verdict = "hangs"


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
    check: Callable
    advice: bool = False  # good to follow, but a solution without it is not wrong


def check(condition, found: str, expected: str, looks_like: str = "") -> None:
    """Raises `Wrong` where a condition does not hold."""
    if not condition:
        raise Wrong(found, expected, looks_like)


def expect(found, expected, slips: Mapping, where: str, rel=2e-3, scale=1e-6, allowed: Mapping | None = None) -> None:
    """Raises `Wrong` where a number, or one of several (T,), is not as expected.

    Args:
        slips: what it looks like -> the number that such a slip would give.
        where: what the number is.
        rel: relative tolerance.
        scale: added to the tolerance, for small numbers.
        allowed: as `slips`, of what the sheet calls as good.
    """
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))

    def close(value) -> bool:
        value = torch.as_tensor(value, dtype=torch.float64)
        return bool(((found - value).abs() <= rel * value.abs() + scale).all())

    if found.shape == expected.shape and close(expected):
        return
    allowed = allowed or {}
    looks_like = next((text for text, value in {**slips, **allowed}.items() if close(value)), "")
    at = ""
    if found.ndim:
        worst = int((found - expected).abs().argmax())
        found, expected, at = found[worst], expected[worst], f" at t = {worst}"
    raise Wrong(f"{where} {found:.4g}{at}", f"{expected:.4g}", looks_like, looks_like in allowed)


def expect_gaussian(noise: Tensor, what: str) -> None:
    """Raises `Wrong` unless the noise has the shape of a Gaussian: excess kurtosis 0 (-1.2 for uniform numbers)."""
    values = noise.double().flatten()
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean().item() - 3
    looks_like = UNIFORM if kurtosis < -1 else ""
    check(abs(kurtosis) <= 0.3, f"{what} with excess kurtosis {kurtosis:.2f}", "0, of a Gaussian", looks_like)


def expect_standard_normal(noise: Tensor, what: str) -> None:
    """Raises `Wrong` for another distribution than N(0, I)."""
    expect_gaussian(noise, what)
    expect(noise.mean(), 0.0, {}, f"mean of {what}", scale=0.03)
    expect(noise.std(), 1.0, {}, f"standard deviation of {what}", rel=0.03)
