"""LoKr: add a Kronecker product of a small matrix and a large one, which is of low rank if it pays.

    ΔW = s · W₁ ⊗ W₂        W₁ (o₁, i₁), W₂ (o₂, i₂)        o₁ o₂ = d_out,  i₁ i₂ = d_in
    W₂ = B A                A (r, i₂), B (o₂, r), where r < max(o₂, i₂) / 2; else W₂ is whole
    Δy = ΔW x               s = α / r

o₁ and i₁ are the largest divisors of d_out and d_in up to `factor` and up to the square root, so
the smaller matrix is W₁. ΔW is formed once a forward, in at least float32.

Start: W₁ = 0, so Δ is bitwise 0; A, B and W₂ uniform in ±1/√(columns). At the first step only W₁
has a gradient. A weight of zeros changes nothing in this.

Edalati et al. 2022, arXiv:2212.10650 (KronA); with W₂ of low rank: Yeh et al. 2023,
arXiv:2309.14859 (LyCORIS).
"""

import math
from typing import ClassVar

import torch
from lora_lite.author import (
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    lora_scale,
    uniform_start,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


def first_factor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is at most `limit` and at most √size."""
    largest = min(limit, math.isqrt(size))
    return next(n for n in range(largest, 0, -1) if size % n == 0)


class LoKr(Variant, name="lokr"):
    """A Kronecker product, ΔW = s · W₁ ⊗ W₂, with W₂ = B A where that is smaller.

    Attributes:
        r: the rank of W₂; one of max(o₂, i₂) / 2 or more trains W₂ whole.
        alpha: the scale s is alpha / r.
        factor: the largest number of rows and of columns that W₁ may have.
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: PositiveInt = 8
    alpha: PositiveFinite = 16.0
    factor: PositiveInt = 16

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows, columns = self.small(site)
        shapes = {"W1": (rows, columns), **self.large(site)}
        return {name: TensorSpec(shape, compute="float32") for name, shape in shapes.items()}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        drawn = {name: uniform_start(shape, rng(name)) for name, shape in self.large(site).items()}
        return {"W1": torch.zeros(self.small(site)), **drawn}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        w2 = t["W2"] if "W2" in t else t["B"] @ t["A"]
        return {CHANGE: torch.kron(lora_scale(self.alpha, self.r) * t["W1"], w2)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out

    def macs_per_forward(self, site: Site) -> int:
        shapes = self.large(site)
        return 0 if "W2" in shapes else self.r * shapes["B"][0] * shapes["A"][1]

    def small(self, site: Site) -> tuple[int, int]:
        """(o₁, i₁), the shape of W₁."""
        return first_factor(site.d_out, self.factor), first_factor(site.d_in, self.factor)

    def large(self, site: Site) -> dict[str, tuple[int, int]]:
        """The shapes of what W₂ is made of."""
        rows, columns = self.small(site)
        rows, columns = site.d_out // rows, site.d_in // columns
        if 2 * self.r < max(rows, columns):
            return {"A": (self.r, columns), "B": (rows, self.r)}
        return {"W2": (rows, columns)}
