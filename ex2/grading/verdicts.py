"""What a fact is: it holds of a submission, or says what was found, what was expected, and what that looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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


def fact(task: str, statement: str, equation: str = "", advice: bool = False):
    """Makes a `Fact` of a function."""
    return lambda function: Fact(task, statement, equation, function, advice)


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
