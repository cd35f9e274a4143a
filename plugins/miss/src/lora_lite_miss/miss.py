"""MiSS: every r-th input shares one learned row, so a single small matrix is trained.

    Δy = D (S x)        D (d_out, r)        S = [I_r I_r ⋯ I_r], cut to d_in columns
    (S x)_i = x_i + x_{i+r} + x_{i+2r} + ⋯

This is LoRA whose A is the comb S, which is neither stored nor trained.

Start: D = 0, so Δ is bitwise 0, and every entry has a gradient at the first step. A weight of zeros
changes nothing in this.

Kang and Yin 2024, arXiv:2409.15371.
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` gives: S (r, d_in).
COMB = "comb"


class MiSS(Variant, name="miss"):
    """Shared shards, Δy = D S x, with S x the sums of every r-th input.

    Attributes:
        r: how many sums there are, 1 ≤ r ≤ d_in.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self.r > site.d_in:
            raise SiteError("r", f"{self.r} sums are more than the d_in={site.d_in} inputs")
        return {"D": TensorSpec((site.d_out, self.r))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"D": torch.zeros(site.d_out, self.r)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        identity = torch.eye(self.r, dtype=t["D"].dtype, device=t["D"].device)
        return {COMB: identity.repeat(1, -(-site.d_in // self.r))[:, : site.d_in]}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(linear(x, t[COMB].to(t["D"].dtype)), t["D"])

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)
