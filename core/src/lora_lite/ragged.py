"""Products of rows with tensors of which every expert has its own.

Rows lie sorted by expert, (rows, d). A `Ragged` stands for the tensor of each row's own expert: it
keeps (experts, ...), and what multiplies rows with it, multiplies every expert's rows with that
expert's. A variant's deltas, written for one layer, run on it as they are. What cannot be done in
this way raises `NotRaggedError`; it is then done expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

LINEAR = (linear,)
MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
# What grouped_mm asks of the rows of a matrix in memory.
ALIGNMENT = 16  # bytes


class NotRaggedError(Exception):
    """Something was asked of a `Ragged` that it cannot do for all experts at once."""


class Groups:
    """Which rows belong to which expert.

    Attributes:
        ids: (rows,), the expert of each row, in ascending order.
        ends: (experts,), int32: the number of rows up to and including each expert's.
    """

    def __init__(self, ids: Tensor, ends: Tensor) -> None:
        self.ids = ids
        self.ends = ends

    def slices(self) -> list[tuple[int, slice]]:
        """The rows of every expert that has some, as (expert, rows)."""
        found, start = [], 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                found.append((expert, slice(start, end)))
            start = end
        return found


class Ragged:
    """A tensor of each row's own expert.

    Args:
        stacked: (experts, ...).
        groups: the rows.
    """

    def __init__(self, stacked: Tensor, groups: Groups) -> None:
        self.stacked = stacked
        self.groups = groups

    @property
    def dtype(self) -> torch.dtype:
        return self.stacked.dtype

    @property
    def device(self) -> torch.device:
        return self.stacked.device

    @property
    def shape(self) -> torch.Size:
        """Of one expert's."""
        return self.stacked.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stacked.ndim - 1

    @property
    def T(self) -> Ragged:  # noqa: N802 (as tensors call it)
        return self._like(self.stacked.mT)

    mT = T  # noqa: N815 (as tensors call it)

    def to(self, *args: Any, **kwargs: Any) -> Ragged:
        return self._like(self.stacked.to(*args, **kwargs))

    def float(self) -> Ragged:
        return self._like(self.stacked.float())

    def detach(self) -> Ragged:
        return self._like(self.stacked.detach())

    def __getattr__(self, name: str) -> Any:
        raise NotRaggedError(f".{name}")

    def __getitem__(self, index: Any) -> Any:
        raise NotRaggedError("[]")

    def __len__(self) -> int:
        return len(self.stacked[0])

    def __neg__(self) -> Ragged:
        return self._like(-self.stacked)

    def __add__(self, other: Any) -> Any:
        return _apply(torch.add, (self, other), {})

    def __radd__(self, other: Any) -> Any:
        return _apply(torch.add, (other, self), {})

    def __sub__(self, other: Any) -> Any:
        return _apply(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return _apply(torch.rsub, (self, other), {})

    def __mul__(self, other: Any) -> Any:
        return _apply(torch.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Any:
        return _apply(torch.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return _apply(torch.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Any:
        return self._like(other / self.stacked) if isinstance(other, int | float) else _no("/")

    def __pow__(self, other: Any) -> Any:
        return _apply(torch.pow, (self, other), {})

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        return product(rows, self)

    def _like(self, stacked: Tensor) -> Ragged:
        return Ragged(stacked, self.groups)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _apply(func, args, kwargs or {})


def product(rows: Tensor, matrices: Ragged) -> Tensor:
    """X M for every expert's own M: (rows, k) with (experts, k, n) to (rows, n)."""
    if rows.ndim != 2 or matrices.ndim != 2:
        raise NotRaggedError("a product that is not of rows with matrices")
    return grouped_product(rows.to(matrices.dtype), matrices.stacked, matrices.groups.ends)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` for all dtypes and sizes.

    Args:
        rows: (rows, k), sorted by expert.
        matrices: (experts, k, n).
        ends: as in `Groups`.
    """
    if rows.dtype == torch.float64 or not hasattr(torch.nn.functional, "grouped_mm"):
        return _product_in_a_loop(rows, matrices, ends)
    unit = ALIGNMENT // rows.element_size()
    more_k, more_n = -matrices.shape[1] % unit, -matrices.shape[2] % unit
    if more_k or more_n:
        rows, matrices = pad(rows, (0, more_k)), pad(matrices, (0, more_n, 0, more_k))
    found: Tensor = _grouped_mm(rows)(rows, matrices, offs=ends)
    return found[:, : found.shape[1] - more_n] if more_n else found


def _grouped_mm(rows: Tensor) -> Callable[..., Tensor]:
    """Torch's own, or that of transformers under a compiler that has torch's in bfloat16 only."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        operators = torch.ops.transformers
        if hasattr(operators, "grouped_mm_fallback"):
            found: Callable[..., Tensor] = operators.grouped_mm_fallback
            return found
    return torch.nn.functional.grouped_mm


def _product_in_a_loop(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    groups = Groups(ends, ends)
    parts = [rows[where] @ matrices[expert] for expert, where in groups.slices()]
    done = sum(len(part) for part in parts)
    parts.append(rows.new_zeros(len(rows) - done, matrices.shape[2]))
    return torch.cat(parts)


# --- what a delta may call


def _apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A function of torch, some of whose arguments are `Ragged`."""
    operands = list(_flat(args))
    ragged = next(each for each in operands if isinstance(each, Ragged))
    if not any(isinstance(each, Tensor) and each.ndim > 0 for each in operands):
        return _expert_by_expert(func, args, kwargs, ragged)
    if func in LINEAR and isinstance(args[1], Ragged):
        return _linear(*args, **kwargs)
    if func in MATMUL and isinstance(args[1], Ragged):
        return product(args[0], args[1])
    if func is torch.einsum:
        return _einsum(*args)
    return func(*map(_of_each_row, args), **kwargs)


def _linear(rows: Tensor, weight: Ragged, bias: Ragged | None = None) -> Tensor:
    found = product(rows, weight.T)
    return found if bias is None else found + _of_each_row(bias)


def _einsum(equation: str, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    return torch.vmap(lambda *own: torch.einsum(equation, *own))(*map(_of_each_row, operands))


def _expert_by_expert(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Ragged
) -> Ragged:
    """A function of no rows, for all experts at once."""
    if any(isinstance(each, list | tuple) for each in args):
        raise NotRaggedError(str(func))

    def of_one(*own: Tensor) -> Any:
        given = iter(own)
        return func(*(next(given) if isinstance(arg, Ragged) else arg for arg in args), **kwargs)

    stacks = [arg.stacked for arg in args if isinstance(arg, Ragged)]
    return like._like(torch.vmap(of_one)(*stacks))


def _of_each_row(value: Any) -> Any:
    """(rows, ...): a copy for each row, which is small for vectors and blocks."""
    return value.stacked[value.groups.ids] if isinstance(value, Ragged) else value


def _flat(args: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for arg in args:
        flat.extend(arg if isinstance(arg, list | tuple) else [arg])
    return flat


def _no(what: str) -> Any:
    raise NotRaggedError(what)
