"""LoHa: add the entrywise product of two low-rank matrices, of rank up to r².

    ΔW = s · (B₁ A₁) ⊙ (B₂ A₂)        A₁, A₂ (r, d_in), B₁, B₂ (d_out, r)        s = α / r
    Δy = ΔW x

ΔW is formed once a forward, in at least float32.

Start: B₁ from N(0, 0.1²), A₁ and A₂ from N(0, 1), and B₂ = 0, so Δ is bitwise 0; at the first step
only B₂ has a gradient. A weight of zeros changes nothing in this.

Hyeon-Woo, Ye-Bin and Oh 2021, arXiv:2108.06098 (FedPara); as an adapter of diffusion models: Yeh et
al. 2023, arXiv:2309.14859 (LyCORIS).
"""

from typing import ClassVar

import torch
from lora_lite.author import (
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    lora_scale,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


class LoHa(Variant, name="loha"):
    """The entrywise product of two low-rank matrices, ΔW = s · (B₁ A₁) ⊙ (B₂ A₂).

    Attributes:
        r: the rank of both factors, 1 ≤ r ≤ min(d_in, d_out); that of ΔW is up to r².
        alpha: the scale s is alpha / r.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8
    alpha: PositiveFinite = 8.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        a = TensorSpec((self.r, site.d_in), compute="float32")
        b = TensorSpec((site.d_out, self.r), compute="float32")
        return {"A1": a, "B1": b, "A2": a, "B2": b}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        return {
            "A1": torch.randn(a, generator=rng("A1")),
            "B1": 0.1 * torch.randn(b, generator=rng("B1")),
            "A2": torch.randn(a, generator=rng("A2")),
            "B2": torch.zeros(b),
        }

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        s = lora_scale(self.alpha, self.r)
        return {CHANGE: s * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out

    def macs_per_forward(self, site: Site) -> int:
        return 2 * self.r * site.d_in * site.d_out
