"""RandLoRA: a change of full rank from random low-rank bases that all layers share.

    Δy = α/r Σ_i B_i diag(λ_i) A diag(γ_i) x        i = 1 ... n,  n = ⌈d_in / r⌉

A (r, d_in) and the bases B_i (d_out, r) are random, frozen, and one for all layers of the same
shape. Trained are the diagonals λ (r, n) and γ (n, d_in) of each layer. Where d_out is smaller than
d_in, the transpose of this is the change, so that γ is on the smaller side and n = ⌈d_out / r⌉.

Start: λ = 0, so Δ is bitwise 0, and γ = 1 / d_in. At the first step λ alone has a gradient. A and B
are uniform with standard deviation 1, and follow from `projection_seed` and their shapes: a file
without derived tensors leaves them out. A weight of zeros changes nothing in this.

Albert et al. 2025, arXiv:2502.00987.
"""

import math
from typing import ClassVar

import torch
from lora_lite.author import PositiveFinite, Rng, Site, Tensors, TensorSpec, Variant
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: diag(λ) A diag(γ), all bases below one another, (r n, smaller side).
SCALED = "scaled"


class RandLoRA(Variant, name="randlora"):
    """A full-rank change, Δy = α/r Σ_i B_i diag(λ_i) A diag(γ_i) x.

    Attributes:
        r: the rank of each random basis. A larger one trains fewer parameters.
        alpha: the scale, over r.
        projection_seed: of the random bases.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 32
    alpha: PositiveFinite = 640.0
    projection_seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        small, large, bases = self.sizes(site)
        a, b = (self.r, small), (large, self.r, bases)
        return {
            "A": TensorSpec(a, trainable=False, derived=True, shared="A"),
            "B": TensorSpec(b, trainable=False, derived=True, shared="B"),
            "lambda": TensorSpec((self.r, bases), compute="float32"),
            "gamma": TensorSpec((bases, small), compute="float32"),
        }

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """The smaller and the larger side of the layer, and the number n of bases."""
        small, large = sorted((site.d_in, site.d_out))
        return small, large, math.ceil(small / self.r)

    def derive(self, site: Site) -> dict[str, Tensor]:
        small, large, bases = self.sizes(site)
        return {
            "A": uniform((self.r, small), self.projection_seed),
            "B": uniform((large, self.r, bases), self.projection_seed + 1),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        small, _, bases = self.sizes(site)
        return {
            "lambda": torch.zeros(self.r, bases),
            "gamma": torch.full((bases, small), 1 / small),
        }

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        a = t["A"].to(t["gamma"].dtype)
        scaled = t["lambda"].unsqueeze(-1) * a.unsqueeze(1) * t["gamma"]  # (r, n, smaller side)
        return {SCALED: scaled.flatten(0, 1)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        scaled, b = t[SCALED].to(y.dtype), t["B"].flatten(1)
        if site.d_in <= site.d_out:
            changed = linear(linear(x, scaled), b)
        else:
            changed = linear(linear(x, b.T), scaled.T)
        return self.alpha / self.r * changed

    def macs_per_token(self, site: Site) -> int:
        return self.r * self.sizes(site)[2] * (site.d_in + site.d_out)


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers, uniform around 0, divided by their standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator) - 0.5
    return drawn / drawn.std()
