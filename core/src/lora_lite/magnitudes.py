"""The largest magnitude in each of many tensors: whether all values are finite, or all zero.

A model has thousands of small tensors of a few shapes. Those of one shape are looked at together.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# How many numbers are copied at a time.
CHUNK = 2**22


def largest_magnitudes(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest |value| of each tensor that holds floating-point numbers, by name.

    It is NaN or infinite exactly if some value is. Tensors of other dtypes, and those
    without values, are left out.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta:
            alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(name)
    largest: dict[str, float] = {}
    for names in alike.values():
        for chunk in _chunks(names, tensors[names[0]].numel()):
            sizes = _largest([tensors[name] for name in chunk])
            largest.update(zip(chunk, sizes, strict=True))
    return largest


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that have values which are not finite."""
    return [name for name, size in largest_magnitudes(tensors).items() if not math.isfinite(size)]


def _chunks(names: Sequence[str], numbers: int) -> Iterator[Sequence[str]]:
    """The names in chunks whose tensors hold about `CHUNK` numbers together."""
    count = max(1, CHUNK // numbers)
    for start in range(0, len(names), count):
        yield names[start : start + count]


@torch.no_grad()
def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """Of tensors of one shape, dtype and device."""
    together = tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
    if together.element_size() == 1:
        together = together.float()  # torch has no arithmetic for float8
    lowest, highest = torch.aminmax(together.flatten(1), dim=1)
    return torch.maximum(lowest.abs(), highest.abs()).tolist()
