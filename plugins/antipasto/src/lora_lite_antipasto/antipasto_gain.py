"""AntiPaSTO gain: turn each frozen singular direction up or down, and learn nothing else.

    W  = U diag(S) V + W_res         frozen: U (d_out, r), S (r), V (r, d_in) and the rest, W_res,
    W' = U diag(S') V + W_res        never built; see basis.py

    bounded     S' = S ⊙ (1 + ELU(c g))       Δy = U (S ⊙ ELU(c g) ⊙ V x)
    additive    S' = S + c δ                  Δy = U (c δ ⊙ V x)

A bounded factor 1 + ELU(c g) is above 0: e^(c g) below 1, 1 + c g above; no direction can flip its
sign. suppress_only keeps every factor S'/S at most 1 for c ≥ 0: after an optimizer step g becomes
min(g, 0), and δ is brought into [-S, 0]. A clamp in the forward would stop the gradient of what has
wandered out.

Start: g = 0 or δ = 0, so Δ is bitwise 0, with a gradient. On a weight of zeros a bounded g has no
gradient, ever: a factor of 0 is 0.

AntiPaSTO: 2026, arXiv:2601.07473. A gain on singular values alone is also the plain form of SVFT,
Lingam et al. 2024, arXiv:2405.19597.
"""

from typing import ClassVar, Literal

import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec
from torch import Tensor
from torch.nn.functional import elu, linear

from lora_lite_antipasto.basis import SingularVariant


class AntiPaSTOGain(SingularVariant, name="antipasto_gain"):
    """Frozen singular vectors with learned gains. Of `SingularVariant`: r, basis, svd, select.

    Attributes:
        mode: "bounded" learns g, relative to S and never below 0; "additive" learns δ, beside S.
        suppress_only: whether a direction can only be turned down. Held by `project`, for scales
            of at least 0.
    """

    recommended_lr: ClassVar[float] = 1e-2

    mode: Literal["bounded", "additive"] = "bounded"
    suppress_only: bool = False

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        trained = "g" if self.mode == "bounded" else "delta"
        return {**self.frozen(site), trained: TensorSpec((self.r,), compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        trained = "g" if self.mode == "bounded" else "delta"
        return {**self.from_data(site, statistics), trained: torch.zeros(self.r)}

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        z = self.coordinates(t, x)
        change = t["S"] * elu(scale * t["g"]) if self.mode == "bounded" else scale * t["delta"]
        return linear(change.to(z.dtype) * z, t["U"])

    def project(self, site: Site, t: Tensors) -> None:
        if self.suppress_only and self.mode == "bounded":
            t["g"].clamp_(max=0)
        elif self.suppress_only:
            lowest = -t["S"].to(t["delta"].dtype)
            t["delta"].copy_(torch.maximum(t["delta"].clamp(max=0), lowest))

    def macs_per_token(self, site: Site) -> int:
        return self.macs_of_basis(site)
