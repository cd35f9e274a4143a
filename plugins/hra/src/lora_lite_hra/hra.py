"""HRA: turn the layer's input by a product of r learned Householder reflections.

    x' = H_1 H_2 ⋯ H_r x,       H_i = I - 2 u_i u_iᵀ / ‖u_i‖²        U (r, d_in), rows u_i, trained

The product is never formed. In compact WY form, with an r × r upper triangular T,

    Δx = - Uᵀ T U x,            T⁻¹ = strict_upper(G) + ½ diag(G),   G = U Uᵀ

which takes two matrix products instead of r passes over x.

Start: r/2 random rows, each twice in a row, so that neighbours cancel: Δ is 0 up to rounding, and
the two rows of a pair have opposite gradients. A weight of zeros gives nothing a gradient, ever.

Near the start the two rows of a pair differ by little, and all of Δ is in that difference. So Δ is
computed from the mean and half the difference of the two unit rows, where nothing cancels:

    Δx = - Mᵀ K M x,      Û = C M:  û_1 = m_1 + d_1,  û_2 = m_1 - d_1,  …       K = Cᵀ T C

M and K are computed once a forward, in at least float32, with T from the unit rows Û.

The paper's regulariser, added to the loss by `adapter.penalty()`, draws the rows towards
orthogonality (Û: unit rows):

    reg · ‖I - Û Ûᵀ‖²_F

Yuan, Liu and Xu 2024, arXiv:2405.17484. Compact WY: Schreiber and Van Loan 1989.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import (
    NonNegativeFinite,
    Rng,
    Site,
    SiteError,
    Tensors,
    TensorSpec,
    Variant,
    uniform_start,
)
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear, normalize

# What `prepare` computes: M (r, d_in), the means and then the half differences, and K (r, r).
PAIRS = "pairs"
CORE = "K"


# A row shorter than this has no direction: it counts as this long.
SMALLEST_LENGTH = 1e-6


class HRA(Variant, name="hra"):
    """Householder reflections of the input, Δx = - Uᵀ T U x.

    Attributes:
        r: how many reflections, even, 2 ≤ r ≤ d_in.
        reg: weight of the regulariser in `adapter.penalty()`; the paper suggests 1e-5 to 1e-3. 0
            leaves it out.
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    reg: NonNegativeFinite = 0.0

    @property
    def identity(self) -> Literal["rounding"]:
        return "rounding"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self.r > site.d_in:
            raise SiteError(
                "r",
                f"{self.r} reflections are more than d_in={site.d_in}; "
                "possible are even r up to d_in",
            )
        # Without decay: only the direction of a row counts.
        return {"U": TensorSpec((self.r, site.d_in), decay=False, compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        # Uniform in ±√(2/r), the spread of the published code.
        spread = math.sqrt(2 / self.r) * math.sqrt(site.d_in)
        half = spread * uniform_start((self.r // 2, site.d_in), rng("U"))
        return {"U": half.repeat_interleave(2, dim=0)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        unit = normalize(t["U"], dim=1, eps=SMALLEST_LENGTH)
        first, second = unit[0::2], unit[1::2]
        pairs = torch.cat([(first + second) / 2, (first - second) / 2])
        reflections = self.triangle(unit)
        first, second = reflections[0::2], reflections[1::2]
        by_rows = torch.cat([first + second, first - second])  # Cᵀ T
        first, second = by_rows[:, 0::2], by_rows[:, 1::2]
        return {PAIRS: pairs, CORE: torch.cat([first + second, first - second], dim=1)}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        m, k = t[PAIRS].to(x.dtype), t[CORE]
        turned = linear(linear(x, m).to(k.dtype), k)
        return -turned.to(x.dtype) @ m

    def triangle(self, unit: Tensor) -> Tensor:
        """T, from the unit rows Û: then ½ diag(G) is ½ I."""
        identity = torch.eye(self.r, dtype=unit.dtype, device=unit.device)
        inverse = torch.triu(unit @ unit.T, 1) + identity / 2
        solved: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
        return solved

    def penalty(self, site: Site, t: Tensors) -> Tensor | None:
        if not self.reg:
            return None
        unit = normalize(t["U"].to(torch.promote_types(t["U"].dtype, torch.float32)), dim=1)
        excess: Tensor = torch.eye(self.r).to(unit) - unit @ unit.T
        return self.reg * excess.square().sum()

    def macs_per_token(self, site: Site) -> int:
        return 2 * self.r * site.d_in + self.r**2

    def macs_per_forward(self, site: Site) -> int:
        return self.r**2 * site.d_in
