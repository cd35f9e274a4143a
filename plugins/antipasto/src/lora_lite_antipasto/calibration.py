"""What calibration data tell about a layer: averages, and the decompositions that they orient.

    W M = U diag(S) Q,    V = Q M⁻¹ = diag(1/S) Uᵀ W

    basis         M                   E: average over calibration rows x, divided by √(E‖x‖² / d_in)
    asvd          diag(E|x_j|)^½
    rms           diag(E x_j²)^½
    corda         C = E[x xᵀ]         W C = E[(y - b) xᵀ]
    corda_sqrt    C^½                 U and S are those of E[(y - b) (y - b)ᵀ]^½: the principal
                                      directions of y - b

M is never inverted, so no average is damped. Dividing x first keeps S in the range of the plain
one.

ASVD: Yuan et al. 2023, arXiv:2312.05821. CorDA: Yang et al. 2024, arXiv:2406.05223. Directions by
activation: after Sun et al. 2023 (Wanda), arXiv:2306.11695.
"""

from typing import NamedTuple

import torch
from lora_lite.author import Site
from torch import Tensor

# Rows that are converted to float64 at a time.
BLOCK = 1024


class Averages(NamedTuple):
    """Averages over calibration rows, in float64. y is without its bias, n the narrower of x, y."""

    rows: Tensor
    x_abs: Tensor
    x_square: Tensor
    n: Tensor
    n_n: Tensor
    y_x: Tensor


class Moments:
    """The observer: sums of fixed size, whatever the number of rows.

    Of the two matrices, n nᵀ and y xᵀ, only those that are asked for are kept.
    """

    def __init__(self, site: Site, *, n_n: bool, y_x: bool) -> None:
        self.keeps_n_n = n_n
        self.keeps_y_x = y_x
        self.output_is_narrower = output_is_narrower(site.d_out, site.d_in)
        no_bias = torch.zeros(1, dtype=torch.float64)
        self.bias = site.bias().cpu().double() if site.has_bias else no_bias
        self.sums = Averages(*torch.zeros(len(Averages._fields), dtype=torch.float64))

    def update(self, x: Tensor, y: Tensor) -> None:
        for x_rows, y_rows in zip(torch.split(x, BLOCK), torch.split(y, BLOCK), strict=True):
            more = self._sums(x_rows.cpu().double(), y_rows.cpu().double() - self.bias)
            pairs = zip(self.sums, more, strict=True)
            self.sums = Averages(*(total + part for total, part in pairs))

    def result(self) -> dict[str, Tensor]:
        rows = self.sums.rows
        means = Averages(*(total / rows for total in self.sums))
        return means._replace(rows=rows)._asdict()

    def _sums(self, x: Tensor, y: Tensor) -> Averages:
        n = y if self.output_is_narrower else x
        left_out = torch.zeros((), dtype=torch.float64)
        return Averages(
            rows=left_out + len(x),
            x_abs=x.abs().sum(0),
            x_square=x.square().sum(0),
            n=n.sum(0),
            n_n=n.T @ n if self.keeps_n_n else left_out,
            y_x=y.T @ x if self.keeps_y_x else left_out,
        )


def output_is_narrower(d_out: int, d_in: int) -> bool:
    """Whether n is y."""
    return d_out <= d_in


def asvd(w: Tensor, mean: Averages) -> Tensor:
    """W M for M = diag(E|x_j|)^½."""
    return w * (mean.x_abs / size(mean)).sqrt().to(w)


def rms(w: Tensor, mean: Averages) -> Tensor:
    """W M for M = diag(E x_j²)^½."""
    return w * (mean.x_square.sqrt() / size(mean)).to(w)


def corda(w: Tensor, mean: Averages) -> Tensor:
    """W M for M = C."""
    return (mean.y_x / size(mean) / size(mean)).to(w)


def corda_sqrt(w: Tensor, mean: Averages) -> Tensor:
    """W M for M = C^½; or, where y is narrower, a matrix with the same U and S."""
    eigenvalues, vectors = torch.linalg.eigh(mean.n_n)
    spreads = eigenvalues.clamp_min(0).sqrt() / size(mean)
    root: Tensor = ((vectors * spreads) @ vectors.T).to(w)
    return root if output_is_narrower(*w.shape) else w @ root


def size(mean: Averages) -> Tensor:
    """√(E‖x‖² / d_in)."""
    return mean.x_square.mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def output_variance(u: Tensor, w: Tensor, mean: Averages) -> Tensor:
    """The variance over calibration data of every coordinate of Uᵀ (y - b) = Uᵀ W x."""
    covariance = (mean.n_n - torch.outer(mean.n, mean.n)).to(u)
    coordinates = u.T if output_is_narrower(*w.shape) else u.T @ w
    return ((coordinates @ covariance) * coordinates).sum(1)
