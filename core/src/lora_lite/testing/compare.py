"""Assertions whose messages carry the values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Relative to the largest expected value. Mistakes are far larger than these, rounding far smaller.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class NoEffectError(AssertionError):
    """Something was expected to have an effect, and had none.

    A correct method can do this too where a size is one: a softmax over one choice is constant, and
    an einsum over one number is no matrix product. So `Promise` looks at the case again with more
    room before it says that the promise is broken.
    """


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality, dtype and shape included."""
    _alike(actual, expected, what)
    if not torch.equal(actual, expected):
        raise AssertionError(f"{what}: expected the same bits; {_difference(actual, expected)}")


def all_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Bitwise equality of every tensor, by name."""
    _same_names(actual, expected, what)
    for name, value in expected.items():
        same(actual[name], value, f"{what}: {name}")


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> None:
    """Equality up to rounding in the tensors' dtype."""
    _alike(actual, expected, what)
    assert bool(torch.isfinite(actual).all()), f"{what}: not all finite: {actual}"
    if not is_close(actual, expected, tolerance):
        raise AssertionError(f"{what}: {_difference(actual, expected)}")


def all_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    tolerance: float | None = None,
) -> None:
    """Equality up to rounding of every tensor, by name. Integers are equal."""
    _same_names(actual, expected, what)
    for name, value in expected.items():
        if value.is_floating_point():
            close(actual[name], value, f"{what}: {name}", tolerance)
        else:
            same(actual[name], value, f"{what}: {name}")


def is_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Whether two tensors are equal up to rounding in their dtype."""
    if not actual.numel():
        return True
    actual, expected = actual.detach(), expected.detach()
    allowed = (tolerance or TOLERANCE[actual.dtype]) * max(1e-3, float(expected.abs().max()))
    return float((actual.double() - expected.double()).abs().max()) <= allowed


def differs(actual: Tensor, other: Tensor, what: str) -> None:
    """At least one bit is another."""
    if torch.equal(actual, other):
        raise NoEffectError(f"{what}: expected a difference, got the same bits: {actual}")


def finite(value: Tensor, what: str) -> None:
    """Neither infinite nor NaN anywhere."""
    if not bool(torch.isfinite(value).all()):
        wrong = int((~torch.isfinite(value)).sum())
        raise AssertionError(f"{what}: {wrong} of {value.numel()} entries are not finite: {value}")


def _same_names(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys(), (
        f"{what}: names {sorted(actual)}, expected {sorted(expected)}"
    )


def _alike(actual: Tensor, expected: Tensor, what: str) -> None:
    got = actual.dtype, tuple(actual.shape), actual.device
    wanted = expected.dtype, tuple(expected.shape), expected.device
    assert got == wanted, f"{what}: got {got}, expected {wanted}"


def _difference(actual: Tensor, expected: Tensor) -> str:
    actual, expected = actual.detach(), expected.detach()
    gap = (actual.double() - expected.double()).abs()
    if not gap.numel():
        return "both are empty"
    largest = gap.nan_to_num(torch.inf).argmax()
    place = tuple(int(i) for i in torch.unravel_index(largest, gap.shape)) if gap.ndim else ()
    count = int((gap != 0).sum())
    return (
        f"{count} of {gap.numel()} entries differ, by at most {float(gap.max()):.3g}, at "
        f"{list(place)}: {float(actual[place]):.8g} instead of {float(expected[place]):.8g}"
    )
