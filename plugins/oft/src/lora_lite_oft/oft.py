"""OFT: turn the layer's input, block by block, by a learned orthogonal matrix.

    x'_i = R_iᵀ x_i        R_i = (I - Q_i)(I + Q_i)⁻¹        Q_i = -Q_iᵀ (b, b), i ≤ d_in / b
    Δx_i = (R_iᵀ - I) x_i  R_i - I = -2 Q_i (I + Q_i)⁻¹

R_i is exactly orthogonal (the Cayley transform), and trained are the b (b - 1) / 2 entries of Q_i
above the diagonal. R - I is computed as it stands, so nothing cancels where Q is small. b is the
largest divisor of d_in that is at most `block_size`.

Start: Q = 0, so Δ is bitwise 0, and every entry has a gradient at the first step. On a weight of
zeros nothing has a gradient, ever.

Qiu et al. 2023, arXiv:2306.07280. Turning the input in place of the weight: Qiu et al. 2025,
arXiv:2506.19847.
"""

from typing import Annotated, ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import Field
from torch import Tensor

from lora_lite_oft.cayley import cayley_offset

# What `prepare` computes: R - I (d_in / b, b, b).
TURN = "turn"


class OFT(Variant, name="oft"):
    """Orthogonal blocks on the input, x'_i = R_iᵀ x_i.

    Attributes:
        block_size: the largest b, at least 2; a layer takes the largest divisor of d_in that is no
            larger.
    """

    recommended_lr: ClassVar[float] = 1e-3

    block_size: Annotated[int, Field(ge=2)] = 32

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        b = self.block(site)
        if b == 1:
            raise SiteError(
                "block_size",
                f"{self.block_size} allows no block: d_in={site.d_in} has no divisor from 2 to it",
            )
        return {"Q": TensorSpec((site.d_in // b, b * (b - 1) // 2), compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        b = self.block(site)
        return {"Q": torch.zeros(site.d_in // b, b * (b - 1) // 2)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return {TURN: cayley_offset(t["Q"], self.block(site))}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        turn = t[TURN].to(x.dtype)
        blocks = x.reshape(*x.shape[:-1], site.d_in // self.block(site), self.block(site))
        return torch.einsum("...ib,ibc->...ic", blocks, turn).flatten(-2).to(x.dtype)

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * self.block(site)

    def block(self, site: Site) -> int:
        """b, for this layer."""
        return next(b for b in range(self.block_size, 0, -1) if site.d_in % b == 0)
