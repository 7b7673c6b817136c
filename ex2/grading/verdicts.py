"""What a fact is: it holds of a submission, or says what was found, what was expected, and what that looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NotRight(Exception):
    """Why a fact does not hold of a submission.

    Args:
        verdict: "wrong", "differs" (not as written, as good), "missing", "fails" (an error in its code) or "hangs".
        found: in place of what was expected.
        expected: "" where nothing came that could be compared.
        looks_like: the slip that gives this, where it is known.
    """

    verdict: str
    found: str
    expected: str = ""
    looks_like: str = ""


def missing(what: str) -> NotRight:
    """For a part of the exercise that isn't there, is an empty stub, or can't be called."""
    return NotRight("missing", what)


@dataclass
class Fact:
    """A decorator: makes a fact of a function that raises `NotRight` where it isn't true of a submission."""

    task: str
    statement: str
    equation: str = ""
    advice: bool = False  # good to follow, but a solution without it is not wrong

    def __call__(self, function: Callable) -> Fact:
        self.check = function
        return self


def check(condition, found: str, expected: str, looks_like: str = "") -> None:
    """Raises `NotRight` where a condition does not hold."""
    if not condition:
        raise NotRight("wrong", found, expected, looks_like)


def expect(found, expected, slips: Mapping, where: str, rel=2e-3, scale=1e-6, allowed: Mapping | None = None) -> None:
    """Raises `NotRight` where a number, or one of several (T,), is not as expected.

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
    allowed, at = allowed or {}, ""
    looks_like = next((text for text, value in {**slips, **allowed}.items() if close(value)), "")
    if found.ndim:
        worst = int((found - expected).abs().argmax())
        found, expected, at = found[worst], expected[worst], f" at t = {worst}"
    verdict = "differs" if looks_like in allowed else "wrong"
    raise NotRight(verdict, f"{where} {found:.4g}{at}", f"{expected:.4g}", looks_like)


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
