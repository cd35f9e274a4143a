"""The top-r singular value decomposition that several plugins share, with a fixed sign convention.

    W ≈ U diag(S) V          U (d_out, r), S (r,), V (r, d_in)

"randomized" is subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) with dynamic
shifts (Feng, Yu, Xie and Tang 2024, arXiv:2404.09276). What it finds is judged by its residual; a
spectrum that falls off too slowly for it is decomposed in full.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lora_lite.errors import AdapterError, FieldError, SiteError
from lora_lite.site import Site

SvdMethod = Literal["randomized", "exact"]

# How many directions the iteration follows beside the r that are asked for, at least.
MIN_OVERSAMPLING = 36
# The iterations of each round, and the angle that is found after it from which the next round
# cannot be expected to arrive, so that the full decomposition costs less.
ROUNDS = ((4, 0.5), (3, 0.1), (6, 0.0))
# The angle in radians up to which the space of the r directions is found. It is an estimate, right
# within a sixth or so; the cosine of the true one is 0.9999 or more.
LARGEST_ANGLE = 0.012
# A residual of so many units of rounding of S₁ is rounding.
ROUNDING = 16
# Entries of a row whose sizes differ by less than this share count as equally large.
TIE = 1e-3


def check_rank(r: int, site: Site, field: str = "r") -> None:
    """Raises `SiteError` naming the largest possible rank where r > min(d_in, d_out)."""
    largest = min(site.d_in, site.d_out)
    if r > largest:
        raise SiteError(
            field, f"{r} is larger than this layer allows; the largest possible is {largest}"
        )


def top_r_svd(
    w: Tensor, r: int, method: SvdMethod = "randomized", *, layer: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets, W ≈ U diag(S) V, the same every time for the same W.

    Signs are fixed: the largest entry of every row of V is positive, the first of them where
    several are equally large. Uᵀ W = diag(S) V holds to the rounding of W's own size.

    Args:
        w: (d_out, d_in), any floating dtype; the work is done in float32, or float64 for a float64
            W. Of any size that float32 holds: W is scaled by its largest entry first.
        r: 1 ≤ r ≤ min(d_in, d_out).
        method: "exact" is `torch.linalg.svd`. "randomized" finds the space of the r directions up
            to an angle of 0.014; where W's singular values fall off so slowly that it cannot,
            or where it would save nothing, it is the exact one.
        layer: the path of the layer that W belongs to, for errors.

    Returns:
        U (d_out, r), S (r,), V (r, d_in), orthonormal in their columns and rows. Of a W of zeros
        they are unit vectors, with S = 0.

    Raises:
        AdapterError: W has entries that are not finite.
        FieldError: r is not between 1 and min(d_in, d_out).
    """
    if not 1 <= r <= min(w.shape):
        raise FieldError(
            f"r={r} singular directions of a matrix of shape {tuple(w.shape)}",
            expected=f"It has between 1 and {min(w.shape)} of them",
            fields=("r",),
        )
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    size = _power_of_two(w, layer)
    if size == 0:
        return torch.eye(len(w), r).to(w), w.new_zeros(r), torch.eye(r, w.shape[1]).to(w)
    u, s, v = _decompose(w / size, r, method)
    signs = row_signs(v)
    return u * signs.T, s * size, v * signs


def row_signs(v: Tensor) -> Tensor:
    """±1 for every row of V (r, n), shape (r, 1): the sign of the row's largest entry.

    Where several entries are equally large up to rounding, the first of them counts, so that
    rounding does not decide.
    """
    sizes = v.abs()
    largest = sizes >= (1 - TIE) * sizes.amax(1, keepdim=True)
    first = largest.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(v.gather(1, first) < 0, -1.0, 1.0).to(v.dtype)


def _power_of_two(w: Tensor, layer: str) -> float:
    """The power of two at or below W's largest entry, so that a division by it rounds nothing.

    0 for a W of zeros.
    """
    lowest, highest = torch.aminmax(w)
    largest = max(-float(lowest), float(highest))
    if not math.isfinite(largest):
        raise AdapterError(
            f"the weight of {layer or 'a layer'} has entries that are infinite or not a number",
            expected="A singular value decomposition needs finite ones",
            fix="Load the model again, or leave this layer out (exclude=)",
            layer=layer,
        )
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest else 0.0


def _decompose(w: Tensor, r: int, method: SvdMethod) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets, with any signs."""
    followed = r + max(MIN_OVERSAMPLING, r)
    if method == "randomized" and 2 * followed < min(w.shape):
        found = _randomized_svd(w, r, followed)
        if found is not None:
            return found
    if w.shape[0] >= w.shape[1]:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:  # LAPACK takes two to three times as long for a wide matrix as for a tall one
        v, s, u = torch.linalg.svd(w.T, full_matrices=False)
        u, v = u.T, v.T
    return u[:, :r], s[:r], v[:r]


def _randomized_svd(w: Tensor, r: int, followed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Subspace iteration that follows more than r directions; None where it does not get there."""
    iteration = _SubspaceIteration(w, followed)
    for iterations, hopeless in ROUNDS:
        iteration.advance(iterations)
        u, s, v, residual = iteration.triplets()
        angle = _angle(s, residual, r)
        if angle <= LARGEST_ANGLE:
            return u[:, :r], s[:r], v[:r]
        if angle >= hopeless:
            return None
    return None


class _SubspaceIteration:
    """The rows of Q span those of Ω Aᵀ Π (A Aᵀ - αᵢ). A is W, or Wᵀ where W is tall.

    The shifts α forget small singular values sooner. α is at most σⱼ²/2 for a j between r and the
    number of directions that are followed: |σ² - α| is then larger for what is above σⱼ than for
    anything below it. The iteration shows such an α itself, because its j-th singular value is at
    most σⱼ² - α.
    """

    def __init__(self, w: Tensor, followed: int) -> None:
        self.tall = w.shape[0] > w.shape[1]
        self.a = w.T if self.tall else w
        self.shift = 0.0
        self.shows_shift = 5 * followed // 8
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(followed, self.a.shape[1], generator=generator).to(w)
        self.q = _orthonormal_rows(start @ self.a.T)[0]

    def advance(self, iterations: int) -> None:
        for _ in range(iterations):
            moved = (self.q @ self.a) @ self.a.T - self.shift * self.q
            self.q, triangle = _orthonormal_rows(moved)
            shown = float(torch.linalg.svdvals(triangle)[self.shows_shift])
            self.shift = max(self.shift, (self.shift + shown) / 2)

    def triplets(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U, S, V and a residual R, one row for each direction that is followed; one step forward.

        U diag(S) V is the part of W whose columns are in the space of U, so Uᵀ W = diag(S) V.
        """
        x, s, y = _svd_of_rows(self.q @ self.a)
        narrow, wide = x.T @ self.q, y
        moved = wide @ self.a.T
        residual = moved - s[:, None] * narrow
        if not self.tall:
            self.q = _orthonormal_rows(moved)[0]
            return narrow.T, s, wide, residual
        x, s, self.q = _svd_of_rows(moved)
        return (x.T @ wide).T, s, self.q, residual


def _orthonormal_rows(m: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal rows and a triangle T, M = T Q."""
    q, triangle = torch.linalg.qr(m.T)
    return q.T, triangle.T


def _svd_of_rows(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix with few rows, M = X diag(S) Y."""
    y, triangle = torch.linalg.qr(m.T)
    turn, s, x = torch.linalg.svd(triangle)
    return x.T, s, (y @ turn).T


def _angle(s: Tensor, residual: Tensor, r: int) -> float:
    """To first order, the largest angle between the space of r directions and the true one.

    The residual R lies outside of all directions that are followed, where W has singular values of
    at most about h, the smallest followed one. What it turns the first r directions by, itself and
    by way of the followed others, is

        R_i σ_i / (σ_i² - h²)   and   R_i · R_j σ_i σ_j / (σ_i² - h²) / (σ_i² - σ_j²),   i ≤ r < j
    """
    rounding = ROUNDING * torch.finfo(s.dtype).eps * float(s[0])
    if float(torch.linalg.vector_norm(residual[:r], dim=1).max()) <= rounding:
        return 0.0
    weighted = (s[:r] / (s[:r] ** 2 - s[-1] ** 2))[:, None] * residual[:r]
    others = weighted @ (s[r:, None] * residual[r:]).T / (s[:r, None] ** 2 - s[r:] ** 2)
    squares = weighted @ weighted.T + others @ others.T
    if not bool(squares.isfinite().all()):
        return math.inf
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(squares)[-1])))
