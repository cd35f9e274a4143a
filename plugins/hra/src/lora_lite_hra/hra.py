"""HRA: turn the layer's input by a product of r learned Householder reflections.

    x' = H_1 H_2 ⋯ H_r x,       H_i = I - 2 u_i u_iᵀ / ‖u_i‖²        U (r, d_in), rows u_i, trained, of any length

The product is never formed. In compact WY form, with an r × r upper triangular T,

    Δx = - Uᵀ T U x,            T⁻¹ = strict_upper(G) + ½ diag(G),   G = U Uᵀ

which takes two matrix products instead of r passes over x. T is computed on unit rows, in at least float32, once a forward.

Start: r/2 random rows, each twice in a row, so that neighbours cancel: Δ is 0 up to rounding, and the two rows of a pair have
opposite gradients.

The paper's regulariser, added to the loss by `adapter.penalty()`, draws the rows towards orthogonality (Û: unit rows):

    reg · ‖I - Û Ûᵀ‖²_F

Yuan, Liu and Xu 2024, arXiv:2405.17484. Compact WY: Schreiber and Van Loan 1989.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import linear, normalize


class HRA(Variant, name="hra"):
    """Householder reflections of the input, Δx = - Uᵀ T U x.

    Attributes:
        r: how many reflections, even, 2 ≤ r ≤ d_in.
        reg: weight of the regulariser in `adapter.penalty()`; the paper suggests 1e-5 to 1e-3. 0 leaves it out.
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    reg: NonNegativeFloat = 0.0

    @property
    def identity(self) -> Literal["rounding"]:
        return "rounding"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self.r > site.d_in:
            raise SiteError(
                "r",
                f"{self.r} reflections are more than d_in={site.d_in}; possible are even r up to d_in",
            )
        return {"U": TensorSpec((self.r, site.d_in), compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        half = torch.empty(self.r // 2, site.d_in).uniform_(-1, 1, generator=rng("U")) * math.sqrt(
            2 / self.r
        )
        return {"U": half.repeat_interleave(2, dim=0)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        gram = t["U"] @ t["U"].T
        length = gram.diagonal().clamp_min(1e-12).sqrt()
        outer = torch.outer(length, length)
        identity = torch.eye(self.r, dtype=gram.dtype, device=gram.device)
        inverse = torch.triu(gram / outer, 1) + identity / 2
        return {"T": torch.linalg.solve_triangular(inverse, identity, upper=True) / outer}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        u = t["U"].to(x.dtype)
        p = linear(x, u)
        q = linear(p.to(t["T"].dtype), t["T"])
        return -q.to(x.dtype) @ u

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
