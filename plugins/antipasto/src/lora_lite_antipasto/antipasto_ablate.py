"""AntiPaSTO ablation: learn k directions of the output, and how much of each to remove.

    W' = (I - c O diag(α) Oᵀ) W        O = U Ĉ (d_out, k),   Ĉ = orthonormal columns of C (r, k)
                                       0 ≤ α ≤ 1
    Δy = -c · O (α ⊙ P x),             P = Oᵀ W = Ĉᵀ diag(S) V (k, d_in)

U (d_out, r), S (r), V (r, d_in) are frozen: r singular triplets of W, so that Uᵀ W = diag(S) V;
see basis.py. The rest of W has no part in the span of U, so W' x is never longer than W x while
0 ≤ c α ≤ 1; a negative c adds the directions again. α is kept in [0, 1] after an optimizer step,
not in the forward, where a clamp would stop the gradient of what has wandered out.

Start: C ~ N(0, 1/r), α = init_alpha, so Δ is not 0: that much of k random directions is removed,
and both have a gradient. (At α = 0 C has none, and an α that does not grow at once never gives it
one.) At scale 0 it is the base. On a weight of zeros nothing has a gradient, ever: there is nothing
to remove.

AntiPaSTO: 2026, arXiv:2601.07473. One direction, found from data and removed everywhere: Arditi et
al. 2024, arXiv:2406.11717.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import PositiveFinite, Rng, Site, SiteError, Tensors, TensorSpec
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import linear

from lora_lite_antipasto.basis import SingularVariant

# What `prepare` computes: O (d_out, k), and c α ⊙ P (k, d_in).
DIRECTIONS = "O"
REMOVED = "removed"


class AntiPaSTOAblate(SingularVariant, name="antipasto_ablate"):
    """Partial removal of learned output directions. Of `SingularVariant`: r, basis, svd, select.

    Attributes:
        k: how many directions, 1 ≤ k ≤ r.
        init_alpha: how much of them is removed at the start, in (0, 1].
    """

    recommended_lr: ClassVar[float] = 1e-2

    k: PositiveInt = 1
    init_alpha: Annotated[PositiveFinite, Field(le=1)] = 0.05

    @property
    def identity(self) -> Literal["none"]:
        return "none"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        frozen = self.frozen(site)
        if self.k > self.r:
            raise SiteError(
                "k",
                f"{self.k} directions do not fit into a span of r={self.r}; "
                f"the largest possible is {self.r}",
            )
        return {
            **frozen,
            "C": TensorSpec((self.r, self.k), decay=False, compute="float32"),
            "alpha": TensorSpec((self.k,), decay=False, compute="float32"),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {
            **self.from_data(site, statistics),
            "C": torch.randn(self.r, self.k, generator=rng("C")) / math.sqrt(self.r),
            "alpha": torch.full((self.k,), self.init_alpha),
        }

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        columns = torch.linalg.qr(t["C"]).Q
        o = t["U"].to(columns.dtype) @ columns
        p = (columns.T * t["S"]) @ t["V"].to(columns.dtype)
        return {DIRECTIONS: o, REMOVED: scale * t["alpha"][:, None] * p}

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        removed = linear(x, t[REMOVED].to(x.dtype))
        return linear(-removed, t[DIRECTIONS].to(removed.dtype))

    def project(self, site: Site, t: Tensors) -> None:
        t["alpha"].clamp_(0, 1)

    def macs_per_token(self, site: Site) -> int:
        return self.k * (site.d_in + site.d_out)

    def macs_per_forward(self, site: Site) -> int:
        return self.r * self.k * (site.d_in + site.d_out)
