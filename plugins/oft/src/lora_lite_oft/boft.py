"""BOFT: turn the layer's input by a product of m sparse orthogonal matrices, a butterfly.

    y' = (1 + s) ⊙ (W x') + b     x' = B_1ᵀ B_2ᵀ ⋯ B_mᵀ x      B_l = P_l diag(R_l1, …, R_ln) P_lᵀ
    Δx = x' - x                   Δy = s ⊙ (W x')              R_li = (I - Q_li)(I + Q_li)⁻¹

Q_li = -Q_liᵀ is (b, b), i ≤ n = d_in / b, and trained are its entries above the diagonal, and the
factors s of the outputs, (d_out,). The permutation P_l decides what a block turns together: of the
inputs in pieces of b / 2, the pieces k and k + 2^(l-1) of every 2^l. The first factor's blocks are
neighbours, as OFT's are; with m factors every input reaches b 2^(m-1) others. b is the largest even
number that is at most `block_size` and leaves room for the butterfly: b 2^(m-1) divides d_in.

Each factor adds to Δx what it changes, so nothing cancels where Q is small.

Start: Q = 0 and s = 0, so Δ is bitwise 0, and every entry has a gradient at the first step. On a
weight of zeros nothing has a gradient, ever.

Liu et al. 2023, arXiv:2311.06243.
"""

from typing import Annotated, ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import Field
from torch import Tensor

from lora_lite_oft.cayley import cayley_offset

# What `prepare` computes: R - I of every block of every factor, (m, d_in / b, b, b).
TURNS = "turns"


class BOFT(Variant, name="boft"):
    """A butterfly of orthogonal blocks on the input, and a factor on every output.

    Attributes:
        block_size: the largest b, even; a layer takes the largest that leaves room for the factors.
        factors: m, the number of factors; at each the reach of an input doubles.
    """

    recommended_lr: ClassVar[float] = 1e-3

    block_size: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    factors: Annotated[int, Field(ge=1)] = 2

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if site.d_in % 2**self.factors:
            raise SiteError(
                "factors",
                f"{self.factors} factors have no blocks here: 2^{self.factors} does not divide "
                f"d_in={site.d_in}",
            )
        return {
            "Q": TensorSpec(self._shape(site), compute="float32"),
            "s": TensorSpec((site.d_out,)),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"Q": torch.zeros(self._shape(site)), "s": torch.zeros(site.d_out)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return {TURNS: cayley_offset(t["Q"], self.block(site))}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        turns = t[TURNS].to(x.dtype)
        delta = torch.zeros_like(x)
        for level in reversed(range(self.factors)):
            delta = delta + self._change(site, turns[level], x + delta, level)
        return delta

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        without_bias = y - site.bias().to(y.dtype) if site.has_bias else y
        return t["s"] * without_bias

    def macs_per_token(self, site: Site) -> int:
        return self.factors * site.d_in * self.block(site)

    def block(self, site: Site) -> int:
        """b, for this layer."""
        room = site.d_in // 2 ** (self.factors - 1)
        return next(b for b in range(self.block_size, 0, -2) if room % b == 0)

    def _shape(self, site: Site) -> tuple[int, int, int]:
        b = self.block(site)
        return self.factors, site.d_in // b, b * (b - 1) // 2

    def _change(self, site: Site, turns: Tensor, x: Tensor, level: int) -> Tensor:
        """(B - I)ᵀ x, of one factor.

        Args:
            site: the layer.
            turns: R - I of the factor's blocks, (d_in / b, b, b).
            x: (..., d_in).
            level: l - 1: the two pieces of a block lie 2^level pieces apart.
        """
        b, apart = self.block(site), 2**level
        groups = site.d_in // (apart * b)
        # (..., groups, first or second piece of a block, block of the group, b / 2)
        pieces = x.reshape(*x.shape[:-1], groups, 2, apart, b // 2).transpose(-3, -2)
        blocks = pieces.reshape(*x.shape[:-1], site.d_in // b, b)
        turned = torch.einsum("...ib,ibc->...ic", blocks, turns).to(x.dtype)
        return turned.view(pieces.shape).transpose(-3, -2).flatten(-4)
