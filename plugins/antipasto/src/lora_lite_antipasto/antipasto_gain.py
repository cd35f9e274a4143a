"""AntiPaSTO gain: turn each frozen singular direction of the weight up or down, and learn nothing else.

    W' = U diag(S') V + W_res          frozen: r singular triplets U (d_out, r), S (r), V (r, d_in), and the rest; see basis.py

    bounded     S' = S ⊙ (1 + ELU(c g))       a factor above 0: e^(c g) below 1, 1 + c g above; no direction can flip its sign
    additive    S' = S + c δ

    Δy = U (e ⊙ z),      z = Uᵀ (y - b) = S ⊙ V x,      e = ELU(c g)   or   c δ / S

suppress_only keeps every factor S'/S at most 1 for c ≥ 0: after an optimizer step g becomes min(g, 0), and δ is brought into
[-S, 0]. A clamp in the forward would stop the gradient of what has wandered out.

Start: g = 0 or δ = 0, so Δ is bitwise 0, with a gradient.

AntiPaSTO: 2026, arXiv:2601.07473. A gain on singular values alone is also the plain form of SVFT, Lingam et al. 2024,
arXiv:2405.19597.
"""

from typing import ClassVar, Literal

import torch
from lora_lite import Site, Tensors, TensorSpec
from torch import Tensor
from torch.nn.functional import elu

from lora_lite_antipasto.basis import SelectingCore, inverse


class AntiPaSTOGain(SelectingCore, name="antipasto_gain"):
    """Frozen singular basis with learned gains. Of `SelectingCore`: r, basis, select, svd.

    Attributes:
        mode: "bounded" learns g, relative to S and never below 0; "additive" learns δ, beside S.
        suppress_only: whether a direction can only be turned down. Held by `project`, for scales of at least 0.
    """

    recommended_lr: ClassVar[float] = 1e-2

    mode: Literal["bounded", "additive"] = "bounded"
    suppress_only: bool = False

    def core_tensors(self) -> dict[str, TensorSpec]:
        return {
            "g" if self.mode == "bounded" else "delta": TensorSpec((self.r,), compute="float32")
        }

    def core(self, t: Tensors, scale: float) -> dict[str, Tensor]:
        return {
            "e": elu(scale * t["g"])
            if self.mode == "bounded"
            else scale * t["delta"] * inverse(t["S"])
        }

    def through(self, t: Tensors, z: Tensor) -> Tensor:
        return t["e"].to(z.dtype) * z

    def project(self, site: Site, t: Tensors) -> None:
        if self.suppress_only and self.mode == "bounded":
            t["g"].clamp_(max=0)
        elif self.suppress_only:
            t["delta"].copy_(torch.maximum(t["delta"].clamp(max=0), -t["S"].to(t["delta"].dtype)))
