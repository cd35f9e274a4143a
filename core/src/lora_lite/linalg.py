"""The top-r singular value decomposition that several plugins share, with a fixed sign convention."""

from typing import Literal

import torch
from torch import Tensor

from lora_lite.errors import SiteError
from lora_lite.site import Site

SvdMethod = Literal["randomized", "exact"]

# Oversampling p and power iterations q of the randomised method, as multiples that depend on the rank.
MIN_OVERSAMPLING = 32
POWER_ITERATIONS = 4


def check_rank(r: int, site: Site, field: str = "r") -> None:
    """Raises `SiteError` naming the largest possible rank where r > min(d_in, d_out)."""
    largest = min(site.d_in, site.d_out)
    if r > largest:
        raise SiteError(
            field, f"{r} is larger than this layer allows; the largest possible is {largest}"
        )


def top_r_svd(w: Tensor, r: int, method: SvdMethod = "randomized") -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets, W ≈ U diag(S) V, the same every time for the same W.

    Signs are fixed: the entry of largest magnitude in every row of V is positive.

    Args:
        w: (d_out, d_in), any floating dtype; the work is done in float32, or float64 for a float64 W.
        r: 1 ≤ r ≤ min(d_in, d_out).
        method: "exact" is `torch.linalg.svd`. "randomized" is subspace iteration with oversampling (Halko, Martinsson and
            Tropp 2011, arXiv:0909.4061) from a fixed start; where that would save nothing it is the exact one.

    Returns:
        U (d_out, r), S (r,), V (r, d_in), orthonormal in their columns and rows.
    """
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    size = r + max(MIN_OVERSAMPLING, r)
    if method == "exact" or 2 * size >= min(w.shape):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = _randomized_svd(w, size)
    u, s, v = u[:, :r], s[:r], v[:r]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(v.dtype)
    return u * signs.T, s, v * signs


def _randomized_svd(w: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """On the side of the smaller dimension: the range of Π (W Wᵀ - αᵢ) W Ω, then the SVD of the small projection.

    The shifts α (Feng, Yu, Xie and Tang 2024, arXiv:2404.09276) forget small singular values sooner. α is at most σⱼ²/2 for a j
    between r and `size`: |σ² - α| is then larger for what is above σⱼ than for anything below it. The iteration shows such an
    α itself, because its j-th singular value is at most σⱼ² - α.
    """
    tall = w.shape[0] > w.shape[1]
    a = w.T if tall else w
    start = torch.randn(a.shape[1], size, generator=torch.Generator().manual_seed(0)).to(a)
    q, shift = torch.linalg.qr(a @ start).Q, 0.0
    for _ in range(POWER_ITERATIONS):
        q, triangle = torch.linalg.qr(a @ (a.T @ q) - shift * q)
        shift = max(shift, (shift + float(torch.linalg.svdvals(triangle)[5 * size // 8])) / 2)
    p, triangle = torch.linalg.qr(a.T @ q)
    u, s, v = torch.linalg.svd(triangle)
    return (p @ u, s, v @ q.T) if tall else (q @ v.T, s, (p @ u).T)
