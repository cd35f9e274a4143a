"""HiRA: scale each entry of the weight by what a low-rank matrix says, so the change has high rank.

    ΔW = W ⊙ (B A)        A (r, d_in), B (d_out, r)        ⊙ entry by entry
    Δy = ΔW x

The rank of ΔW is up to r · rank(W). ΔW is formed once a forward, in at least float32, from W as it
is stored, which is read and not written.

Start: A uniform in ±1/√d_in, B = 0, so Δ is bitwise 0; at the first step only B has a gradient. An
entry of W that is 0 stays 0, so on a weight of zeros nothing has a gradient, ever.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models", ICLR 2025 (openreview.net/forum?id=TwJrTz9cRS; not on arXiv).
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant, check_rank, uniform_start
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


class HiRA(Variant, name="hira"):
    """A low-rank factor on every entry of the weight, ΔW = W ⊙ (B A).

    Attributes:
        r: the rank of the factor, 1 ≤ r ≤ min(d_in, d_out).
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: PositiveInt = 32

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {
            "A": TensorSpec((self.r, site.d_in), compute="float32"),
            "B": TensorSpec((site.d_out, self.r), compute="float32"),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a = uniform_start((self.r, site.d_in), rng("A"))
        return {"A": a, "B": torch.zeros(site.d_out, self.r)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        factor = t["B"] @ t["A"]
        return {CHANGE: site.weight().to(factor.dtype) * factor}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out

    def macs_per_forward(self, site: Site) -> int:
        return self.r * site.d_in * site.d_out
