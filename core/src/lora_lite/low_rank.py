"""An adapter's change as low-rank factors, exactly, for every variant whose change is of low rank.

    y' - y = B (A x) + c        A (rank, d_in),  B (d_out, rank),  c (d_out,)

A change that is affine in x has such a form, whatever the variant. It is read off the variant's own
deltas, in float64:

1. c is the change at x = 0.
2. The changes of random inputs span the column space of ΔW; Q is an orthonormal basis of it. As
   long as each new one adds a direction there may be more, and their number is doubled.
3. One vector-Jacobian product gives the rows Qᵀ ΔW, and its singular value decomposition the rank.
4. The factors are compared with the change of other random inputs: a change that is not affine in
   x has no such form.

Neither ΔW nor an identity matrix is formed.

Random probes for the range of a matrix: Halko, Martinsson and Tropp 2011, arXiv:0909.4061.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.arguments import is_whole
from lora_lite.change import LayerChange
from lora_lite.errors import AdapterError

FIRST_PROBES = 16
PROBES_OF_ERROR = 64
SUBSPACE_ITERATIONS = 3
# A change of a layer of this width is of low rank if it is not of full rank.
SMALL_LAYER = 256
# Singular values of ΔW below this share of its largest, or of W's, are rounding in float64.
NEGLIGIBLE = 1e-9
NEGLIGIBLE_BESIDE_W = 1e-13
# How far an affine change may be from its factors, relative to its size, by rounding alone.
AFFINE = 1e-6


@dataclass(frozen=True)
class LowRank:
    """The change of one layer, y' - y = B (A x) + c.

    Attributes:
        A: (rank, d_in), float64.
        B: (d_out, rank), float64. It has the norms of A: both hold the square root of the singular
            values of ΔW, which fall with the row.
        offset: c (d_out,), float64; None if it is 0.
        error: ‖ΔW - B A‖ / ‖ΔW‖, in Frobenius norms: 0 unless it was truncated.
    """

    A: Tensor
    B: Tensor
    offset: Tensor | None
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.A)


def low_rank(changes: Iterable[LayerChange], rank: int | None = None) -> dict[str, LowRank]:
    """The factors of every layer, by path.

    Args:
        changes: of the layers.
        rank: the largest rank to keep; None for exact factors.

    Raises:
        AdapterError: no rank is given and some changes are of full rank, or some are not affine.
    """
    if rank is not None and (not is_whole(rank) or rank < 1):
        raise AdapterError(f"rank={rank!r} is not a whole number of at least 1")
    found: dict[str, LowRank] = {}
    full: dict[str, str] = {}
    for change in changes:
        path = change.site.path
        factors = _exact(change) if rank is None else _up_to(change, rank)
        if factors is None:
            size = f"{change.site.d_in} -> {change.site.d_out}"
            full[path] = f"{path} ({size}): {change.variant} changes every direction of it"
        else:
            found[path] = factors
    if full:
        raise AdapterError(
            f"{len(full)} of {len(full) + len(found)} layers are changed by a matrix of full rank",
            details=list(full.values()),
            expected="As low-rank factors it would be larger than the weight itself",
            fix='Write the whole weights, by adapter.save(folder, format="merged"); or give rank=, '
            "to keep only the largest part of the change",
            layer=next(iter(full)),
        )
    return found


def _exact(change: LayerChange) -> LowRank | None:
    """The factors of one layer; None if its rank is full, or for a large layer more than half."""
    largest = min(change.site.d_in, change.site.d_out)
    limit = largest if largest <= SMALL_LAYER else largest // 2
    return factors_of(change, max(limit - 1, 1))


def _up_to(change: LayerChange, rank: int) -> LowRank:
    """The factors of one layer, truncated to a rank."""
    largest = min(change.site.d_in, change.site.d_out)
    factors = factors_of(change, largest if largest <= SMALL_LAYER else 2 * rank)
    if factors is None:
        return _largest_part(change, rank)
    return _truncated(factors, rank) if factors.rank > rank else factors


@torch.inference_mode(False)
def factors_of(change: LayerChange, most: int) -> LowRank | None:
    """The factors of one layer; None if its rank is above `most`.

    Raises:
        AdapterError: the change is not affine in x.
    """
    rng = torch.Generator().manual_seed(0)
    offset = offset_of(change)
    q = _column_space(change, offset, most, rng)
    if q is None:
        return None
    a, b = _balanced(change, q)
    if len(a) > most:
        return None
    x = random_inputs(change, 2, rng)
    refuse_not_affine(change, x, x @ a.T @ b.T + offset)
    return LowRank(a, b, offset if bool(offset.any()) else None)


def _column_space(
    change: LayerChange, offset: Tensor, most: int, rng: torch.Generator
) -> Tensor | None:
    """An orthonormal basis (d_out, rank) of the columns of ΔW; None if the rank is above `most`."""
    largest = min(change.site.d_in, change.site.d_out)
    q = torch.zeros(change.site.d_out, 0, dtype=torch.float64, device=change.device)
    longest = 0.0
    count = min(FIRST_PROBES, largest)
    while True:
        x = random_inputs(change, count - q.shape[1], rng)
        columns = (_evaluate(change, x) - offset).T
        for _ in range(2):  # once leaves rounding behind
            columns = columns - q @ (q.T @ columns)
        new, triangle = torch.linalg.qr(columns)
        # What each column adds to those before it. Where that is rounding, so is its direction.
        lengths = triangle.diagonal().abs()
        longest = max(longest, float(lengths.max()))
        is_real = lengths > _negligible(change, longest, float(x.norm(dim=1).max()))
        q = torch.cat([q, new[:, is_real]], dim=1)
        if not bool(is_real.all()) or count == largest:
            return q
        if count > most:
            return None
        count = min(2 * count, largest)


def _negligible(change: LayerChange, largest: float, length: float = 1.0) -> float:
    """What is rounding: beside the largest change, and beside what W makes of such an input."""
    return max(NEGLIGIBLE * largest, NEGLIGIBLE_BESIDE_W * _size_of_weight(change) * length)


def _balanced(change: LayerChange, q: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with B A = Q Qᵀ ΔW, without the singular values that are rounding.

    Args:
        change: of the layer.
        q: orthonormal columns (d_out, count).
    """
    u, s, v = torch.linalg.svd(_rows(change, q), full_matrices=False)
    rank = int((s > _negligible(change, float(s[:1].sum()))).sum())
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], (q @ u[:, :rank]) * root


@torch.inference_mode(False)
def _largest_part(change: LayerChange, rank: int) -> LowRank:
    """About the best factors of this rank, by subspace iteration; the error is estimated."""
    rng = torch.Generator().manual_seed(0)
    offset = offset_of(change)
    x = random_inputs(change, rank + max(FIRST_PROBES, rank), rng)
    for _ in range(SUBSPACE_ITERATIONS):
        q = torch.linalg.qr((_evaluate(change, x) - offset).T).Q
        x = torch.linalg.qr(_rows(change, q).T).Q.T
    q = torch.linalg.qr((_evaluate(change, x) - offset).T).Q
    a, b = _balanced(change, q)
    kept = LowRank(a[:rank], b[:, :rank], offset if bool(offset.any()) else None)
    x = random_inputs(change, PROBES_OF_ERROR, rng)
    whole = _evaluate(change, x) - offset
    lost = float((whole - x @ kept.A.T @ kept.B.T).norm() / whole.norm())
    return LowRank(kept.A, kept.B, kept.offset, lost)


def random_inputs(change: LayerChange, count: int, rng: torch.Generator) -> Tensor:
    """Random inputs (count, d_in): drawn on the CPU, for the same ones on every device."""
    drawn = torch.randn(count, change.site.d_in, dtype=torch.float64, generator=rng)
    return drawn.to(change.device)


@torch.no_grad()
def _evaluate(change: LayerChange, x: Tensor) -> Tensor:
    return change(x)


def offset_of(change: LayerChange) -> Tensor:
    """The change at x = 0 (d_out,), in float64; exactly 0 where it is rounding of the bias."""
    zero = torch.zeros(1, change.site.d_in, dtype=torch.float64, device=change.device)
    offset = _evaluate(change, zero)[0]
    if not change.site.has_bias:
        return offset
    negligible = NEGLIGIBLE * float(change.site.bias().abs().max())
    return torch.zeros_like(offset) if float(offset.abs().max()) <= negligible else offset


@torch.enable_grad()
def _rows(change: LayerChange, q: Tensor) -> Tensor:
    """Qᵀ ΔW (count, d_in), by one vector-Jacobian product."""
    count, d_in = q.shape[1], change.site.d_in
    x = torch.zeros(count, d_in, dtype=q.dtype, device=q.device, requires_grad=True)
    changed = change(x)
    if not changed.requires_grad:
        return torch.zeros_like(x)  # the change is an offset alone
    (rows,) = torch.autograd.grad(changed, x, q.T.contiguous(), allow_unused=True)
    return torch.zeros_like(x) if rows is None else rows


@torch.no_grad()
def _size_of_weight(change: LayerChange) -> float:
    """About the largest singular value of W; about, since it only tells what is rounding."""
    x = random_inputs(change, 1, torch.Generator().manual_seed(0))
    return float(change.site.matmul(x).norm() / x.norm())


def refuse_not_affine(change: LayerChange, x: Tensor, expected: Tensor) -> None:
    """An error if the change is not what a matrix and an offset make of some random inputs.

    Args:
        change: of the layer.
        x: the inputs (rows, d_in).
        expected: x ΔWᵀ + c (rows, d_out).

    Raises:
        AdapterError: it is not.
    """
    changed = _evaluate(change, x)
    size = max(float(changed.norm()), 1e-6 * _size_of_weight(change) * float(x.norm()))
    if not float((changed - expected).norm()) <= AFFINE * size:
        raise AdapterError(
            f"{change.site.path}: {change.variant} changes the output by something that is not "
            "linear in the layer's input",
            expected="Only a linear change can be written as a matrix",
            fix="Leave the adapter in its own file: adapter.save(path)",
            layer=change.site.path,
        )


def _truncated(factors: LowRank, rank: int) -> LowRank:
    """The best approximation of a lower rank: the rows are in the order of the singular values."""
    singular = factors.A.norm(dim=1).square()
    error = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    return LowRank(factors.A[:rank], factors.B[:, :rank], factors.offset, error)
