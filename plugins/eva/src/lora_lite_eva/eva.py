"""EVA: LoRA whose A starts as the directions in which the layer's input varies most.

    Δy = s · B (A x)        A (r, d_in), B (d_out, r)        s = α / r,  or α / √r with rslora

Start: the rows of A are the first r principal directions of x on calibration data, of length 1, and
B = 0, so Δ is bitwise 0; at the first step only B has a gradient. A weight of zeros changes nothing
in this.

With ρ > 1 rank moves to where it explains most: of all directions of all sites, each with its
share of its own site's variance, the r · (number of sites) largest are kept, at most ρ r at a site.
A site may end with none, and is then left out. α follows the rank, so the scale s stays.

How the directions are found in one pass is in principal.py.

Paischer et al. 2024, arXiv:2410.07170.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from lora_lite.author import (
    CalibrationError,
    DropoutRate,
    Finite,
    Observer,
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    lora_scale,
)
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import dropout, linear

from lora_lite_eva.principal import Components, PrincipalDirections

# Singular values below this share of the data's norm are rounding, not data.
NEGLIGIBLE = 1e-6


class EVA(Variant, name="eva"):
    """A low-rank update that starts from the principal directions of its input.

    It needs calibration data (`attach(..., calibration=...)`).

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out); with rho > 1 the mean rank over all sites.
        alpha: the scale is alpha / r.
        rslora: scale by alpha / √r instead, so that the update does not shrink as r grows.
        dropout: probability of dropping an entry of x on its way to A, in training mode.
        rho: ρ ≥ 1, the largest rank of a site is rho · r; 1 gives all sites the same rank.
        center: whether the mean of x is taken off first. Without, the mean takes one direction.
        whiten: whether each row of A is divided by the square root of its singular value.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8
    alpha: PositiveFinite = 16.0
    rslora: bool = False
    dropout: DropoutRate = 0.0
    rho: Annotated[Finite, Field(ge=1)] = 1.0
    center: bool = True
    whiten: bool = False

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def observe(self, site: Site) -> Observer:
        largest = self._largest_rank(site)
        followed = min(max(4 * largest, largest + 32), site.d_in)
        return PrincipalDirections(followed, site.d_in, self.center)

    def specialize(
        self, sites: Mapping[str, Site], statistics: Mapping[str, Tensors]
    ) -> Mapping[str, Variant | None]:
        shares = {
            path: self._shares_of_variance(sites[path], Components(**found))
            for path, found in statistics.items()
        }
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
        found = Components(**statistics)
        a = found.directions[: self.r]
        if self.whiten:
            a = a / found.singular_values[: self.r].sqrt()[:, None]
        return {"A": a, "B": torch.zeros(site.d_out, self.r)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        s = lora_scale(self.alpha, self.r, rslora=self.rslora)
        return linear(s * linear(dropout(x, self.dropout, site.training), t["A"]), t["B"])

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)

    def _largest_rank(self, site: Site) -> int:
        return min(round(self.rho * self.r), site.d_in, site.d_out)

    def _shares_of_variance(self, site: Site, found: Components) -> list[float]:
        """Of every direction that the site may use, largest first.

        Raises:
            CalibrationError: the data span fewer than r directions.
        """
        s = found.singular_values
        spanned = int((s > NEGLIGIBLE * found.norm).sum())
        if spanned < self.r:
            around = " around their mean" if self.center else ""
            raise CalibrationError(
                f"{site.path}: r={self.r} directions are to be found, and the {int(found.rows)} "
                f"calibration tokens here span only {spanned}{around}",
                fix="Give more tokens, or a smaller r",
            )
        usable = min(spanned, self._largest_rank(site))
        shares: list[float] = (s[:usable] ** 2 / float(found.sum_of_squares)).tolist()
        return shares

    def _with_rank(self, r: int) -> Variant | None:
        """The same variant at another rank, with the same scale; None for rank 0."""
        if r == 0:
            return None
        growth = math.sqrt(r / self.r) if self.rslora else r / self.r
        return self.model_copy(update={"r": r, "alpha": self.alpha * growth})
