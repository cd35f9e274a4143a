"""AntiPaSTO ablation: learn k directions of the layer's output, inside its top-r singular span, and how much of each to remove.

    W' = (I - c O diag(α) Oᵀ) W          O = U Ĉ (d_out, k),   Ĉ = orthonormal columns of C (r, k),   0 ≤ α ≤ 1
    Δy = -c · O (α ⊙ Oᵀ (y - b))

U (d_out, r) is frozen: the left vectors of r singular triplets of W; see basis.py. W_res has no part in their span, so W' x is
never longer than W x while 0 ≤ c α ≤ 1; a negative c adds the directions again. α is kept in [0, 1] after an optimizer step,
not in the forward, where a clamp would stop the gradient of what has wandered out.

Start: C ~ N(0, 1/r), α = init_alpha, so Δ is not 0: that much of k random directions is removed, and both have a gradient. (At
α = 0 C has none, and an α that does not grow at once never gives it one.) At scale 0 it is the base.

AntiPaSTO: 2026, arXiv:2601.07473. One direction, found from data and removed everywhere: Arditi et al. 2024, arXiv:2406.11717.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite import Rng, Site, SiteError, Tensors, TensorSpec
from pydantic import Field, PositiveInt
from torch import Tensor

from lora_lite_antipasto.basis import SingularBasis


class AntiPaSTOAblate(SingularBasis, name="antipasto_ablate"):
    """Partial removal of learned output directions. Of `SingularBasis`: r, basis, svd.

    Attributes:
        k: how many directions, 1 ≤ k ≤ r.
        init_alpha: how much of them is removed at the start, in (0, 1].
    """

    recommended_lr: ClassVar[float] = 1e-2

    k: PositiveInt = 1
    init_alpha: Annotated[float, Field(gt=0, le=1)] = 0.05

    @property
    def identity(self) -> Literal["none"]:
        return "none"

    def from_output(self, site: Site) -> bool:
        return True

    def core_tensors(self) -> dict[str, TensorSpec]:
        if self.k > self.r:
            raise SiteError(
                "k",
                f"{self.k} directions do not fit into a span of r={self.r}; the largest possible is {self.r}",
            )
        return {
            "C": TensorSpec((self.r, self.k), decay=False, compute="float32"),
            "alpha": TensorSpec((self.k,), decay=False, compute="float32"),
        }

    def core_start(self, rng: Rng) -> dict[str, Tensor]:
        c = torch.randn(self.r, self.k, generator=rng("C")) / math.sqrt(self.r)
        return {"C": c, "alpha": torch.full((self.k,), self.init_alpha)}

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        o = t["U"] @ torch.linalg.qr(t["C"]).Q.to(t["U"].dtype)
        prepared = {"O": o, "c alpha": (scale * t["alpha"]).to(o.dtype)}
        if site.has_bias:
            prepared["b O"] = site.bias().to(o.dtype) @ o
        return prepared

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        coordinates = y @ t["O"] - t["b O"] if site.has_bias else y @ t["O"]
        return -(t["c alpha"] * coordinates) @ t["O"].T

    def project(self, site: Site, t: Tensors) -> None:
        t["alpha"].clamp_(0, 1)

    def macs_per_token(self, site: Site) -> int:
        return 2 * self.k * site.d_out

    def macs_per_forward(self, site: Site) -> int:
        return self.r * self.k * site.d_out + (self.k * site.d_out if site.has_bias else 0)
