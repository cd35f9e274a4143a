"""C3A: add a matrix of circulant blocks; each block is one learned vector, turned round.

    ΔW = [C(w_ij)] / d_in        i ≤ d_out / b,  j ≤ d_in / b        w_ij (b,), trained
    C(w)_kl = w_{(l - k) mod b}
    Δy = ΔW x

The b × b block C(w) is a circular convolution by w: of rank up to b, from b numbers. b is the
largest divisor of both d_in and d_out that is at most `block_size`. ΔW is formed once a forward.

Start: w = 0, so Δ is bitwise 0, and every entry has a gradient at the first step. A weight of zeros
changes nothing in this.

Chen et al. 2024, arXiv:2407.19342.
"""

import math
from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


class C3A(Variant, name="c3a"):
    """Circular convolutions from block to block, ΔW = [C(w_ij)] / d_in.

    Attributes:
        block_size: the largest b; a layer takes the largest common divisor of d_in and d_out that
            is no larger.
    """

    recommended_lr: ClassVar[float] = 1e-1

    block_size: PositiveInt = 256

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        b = self.block(site)
        return {"w": TensorSpec((site.d_out // b, site.d_in // b, b), compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        b = self.block(site)
        return {"w": torch.zeros(site.d_out // b, site.d_in // b, b)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        steps = torch.arange(self.block(site), device=t["w"].device)
        turns = (steps[None, :] - steps[:, None]) % len(steps)
        blocks = t["w"][:, :, turns]  # (d_out / b, d_in / b, b, b)
        return {CHANGE: blocks.transpose(1, 2).reshape(site.d_out, site.d_in) / site.d_in}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out

    def block(self, site: Site) -> int:
        """b, for this layer."""
        common = math.gcd(site.d_in, site.d_out)
        return next(b for b in range(min(self.block_size, common), 0, -1) if common % b == 0)
