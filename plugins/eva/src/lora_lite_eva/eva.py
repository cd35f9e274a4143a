"""EVA: LoRA whose A starts as the directions in which the layer's input varies most on calibration data.

    Δy = s · B A x        A (r, d_in), B (d_out, r)        s = α / r,  or α / √r with rslora

Start: the rows of A are the first r principal directions of x, of length 1, and B = 0, so Δ is bitwise 0; at the first step
only B has a gradient.

The directions come from one pass: an incremental singular value decomposition keeps k, four times as many as can be used and
at least 32 more, so memory for a site is k × d_in numbers and one block of rows, whatever the number of batches.

With ρ > 1 rank moves to where it explains most: of all directions of all sites, each with its share of its own site's
variance, the r · (number of sites) largest are kept, at most ρ r at a site. A site may end with none, and is then left out.
α follows the rank, so the scale s stays.

Paischer et al. 2024, arXiv:2410.07170. Incremental decomposition with a moving mean: Ross et al. 2008.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from lora_lite import (
    CalibrationError,
    Observer,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
)
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import dropout, linear, normalize

# Singular values below this share of the data's norm are rounding, not data.
NEGLIGIBLE = 1e-6


class EVA(Variant, name="eva"):
    """A low-rank update that starts from the principal directions of its input; needs calibration data.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out); with rho > 1 the mean rank over all sites.
        alpha: the scale is alpha / r.
        rslora: scale by alpha / √r instead, so that the update does not shrink as r grows.
        dropout: probability of dropping an entry of x on its way to A, in training mode.
        rho: ρ ≥ 1, the largest rank of a site is rho · r; 1 gives all sites the same rank.
        center: whether the mean of x is taken off first. Without, the mean takes one of the directions.
        whiten: whether each row of A is divided by the square root of its singular value.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    center: bool = True
    whiten: bool = False

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def observe(self, site: Site) -> Observer:
        largest = self._largest_rank(site)
        return PrincipalDirections(
            min(max(4 * largest, largest + 32), site.d_in), site.d_in, self.center
        )

    def specialize(
        self, sites: Mapping[str, Site], statistics: Mapping[str, Tensors]
    ) -> Mapping[str, Variant | None]:
        shares = {}
        for path, found in statistics.items():
            s = found["singular_values"]
            spanned = int((s > NEGLIGIBLE * found["norm"]).sum())
            if spanned < self.r:
                raise CalibrationError(
                    f"{path}: r={self.r} directions are to be found, and the {int(found['rows'])} calibration tokens here span "
                    f"only {spanned}{' around their mean' if self.center else ''}; give more tokens, or a smaller r"
                )
            variances = s[: min(spanned, self._largest_rank(sites[path]))] ** 2
            shares[path] = (variances / float(found["sum_of_squares"])).tolist()
        if self.rho == 1:
            return {}
        ranked = sorted(
            ((share, path) for path in shares for share in shares[path]), key=lambda pair: -pair[0]
        )
        ranks = Counter(path for _, path in ranked[: self.r * len(sites)])
        return {path: self._with_rank(ranks[path]) for path in sites}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a, s = statistics["directions"][: self.r], statistics["singular_values"][: self.r]
        return {
            "A": a / s.sqrt()[:, None] if self.whiten else a,
            "B": torch.zeros(site.d_out, self.r),
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        scale = self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
        return linear(scale * linear(dropout(x, self.dropout, site.training), t["A"]), t["B"])

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)

    def _largest_rank(self, site: Site) -> int:
        return min(round(self.rho * self.r), site.d_in, site.d_out)

    def _with_rank(self, r: int) -> Variant | None:
        """The same variant at another rank, with the same scale; None for rank 0."""
        growth = math.sqrt(r / self.r) if self.rslora else r / self.r
        return (
            type(self)(**{**self.model_dump(), "r": r, "alpha": self.alpha * growth}) if r else None
        )


class PrincipalDirections:
    """The `kept` largest singular values and right singular vectors of all rows x, or of x less their mean, block by block.

    What is known of earlier rows is K = diag(S) V (kept, d_in). With the next block of rows below it, M = [K; block], the new K
    is the part of Uᵀ M with the largest singular values, U being the eigenvectors of the small M Mᵀ. In float64 on the CPU.
    """

    def __init__(self, kept: int, d_in: int, center: bool) -> None:
        self.kept = kept
        self.center = center
        self.rows = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64)
        self.known = torch.zeros(0, d_in, dtype=torch.float64)
        self.sum_of_squares = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        for block in torch.split(x, max(256, self.kept)):
            if len(block):
                self._add(block.cpu().double())

    def result(self) -> dict[str, Tensor]:
        lengths = self.known.norm(dim=1)
        signs = torch.where(
            self.known.gather(1, self.known.abs().argmax(1, keepdim=True)) < 0, -1, 1
        )
        return {
            "directions": signs * normalize(self.known, dim=1),
            "singular_values": lengths,
            "sum_of_squares": torch.tensor(self.sum_of_squares),
            "norm": torch.tensor(
                self.sum_of_squares + self.rows * float(self.mean.square().sum())
            ).sqrt(),
            "rows": torch.tensor(self.rows),
        }

    def _add(self, block: Tensor) -> None:
        """Take in one block. A mean that has moved counts as one more row."""
        before, now = self.rows, self.rows + len(block)
        if self.center:
            shift = block.mean(0) - self.mean
            self.mean = self.mean + len(block) / now * shift
            block = torch.cat(
                [block - block.mean(0), math.sqrt(before * len(block) / now) * shift[None]]
            )
        stacked = torch.cat([self.known, block])
        u = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)
        self.known = u[:, : self.kept].T @ stacked
        self.sum_of_squares += float(block.square().sum())
        self.rows = now
