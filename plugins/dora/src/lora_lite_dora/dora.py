"""DoRA: learn the length of every row of the weight freely, and its direction by LoRA.

    W' = diag(m / n) (W + s B A)        A (r, d_in), B (d_out, r), m (d_out,)        s = α / r
    n = row norms of W + s B A

The bias is not scaled, and n is a constant to gradients (section 4.3 of the paper). With n₀ the row
norms of W, and the magnitude stored as its offset from them, m = n₀ + dm:

    Δy = s B A x + (ρ - 1) ⊙ (y - b + s B A x)
    ρ = (1 + dm / n₀) / (n / n₀)
    (n / n₀)² = 1 + rows(2 s (W Aᵀ) ⊙ B + s² (B A Aᵀ) ⊙ B) / n₀²

so neither B A nor any other d_out × d_in matrix is formed. n / n₀ is computed once a forward, in at
least float32.

Start: A uniform in ±1/√d_in, B = 0, dm = 0. Then ρ is exactly 1 and Δ bitwise 0; at the first step
B and dm have gradients. On a weight of zeros dm has none at that step: there is no row to lengthen.

Liu et al. 2024, arXiv:2402.09353. The scale α / √r: Kalajdzievski 2023, arXiv:2312.03732.
"""

from typing import ClassVar

import torch
from lora_lite.author import (
    DropoutRate,
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    lora_scale,
    uniform_start,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import dropout, linear

# Row norms of W below this count as this, so that a row of zeros divides nothing by zero.
SMALLEST_NORM = 1e-6

# What `prepare` computes: n / n₀ (d_out,), a constant to gradients, and m / n₀ (d_out,).
GROWTH = "growth"
LENGTHS = "m_n0"


class DoRA(Variant, name="dora"):
    """Learned row lengths, and a low-rank update of the row directions.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale is alpha / r.
        rslora: scale by alpha / √r instead, so that the update does not shrink as r grows.
        dropout: probability of dropping an entry of x on its way to A, in training mode. y and the
            norms are not dropped.
    """

    recommended_lr: ClassVar[float] = 2e-3
    detached: ClassVar[tuple[str, ...]] = (GROWTH,)

    r: PositiveInt = 8
    alpha: PositiveFinite = 16.0
    rslora: bool = False
    dropout: DropoutRate = 0.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        precise = torch.promote_types(site.dtype, torch.float32)
        rows = (site.d_out,)
        return {
            "A": TensorSpec((self.r, site.d_in), compute="float32"),
            "B": TensorSpec((site.d_out, self.r), compute="float32"),
            "dm": TensorSpec(rows, decay=False, compute="float32"),
            "n0": TensorSpec(rows, trainable=False, derived=True, dtype=precise, compute="float32"),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        w = site.weight()
        precise = torch.promote_types(w.dtype, torch.float32)
        return {"n0": torch.linalg.vector_norm(w, dim=1, dtype=precise).clamp_min(SMALLEST_NORM)}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a = uniform_start((self.r, site.d_in), rng("A"))
        return {"A": a, "B": torch.zeros(site.d_out, self.r), "dm": torch.zeros(site.d_out)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return {GROWTH: self.growth(site, t), LENGTHS: 1 + t["dm"] / t["n0"]}

    @torch.no_grad()
    def growth(self, site: Site, t: Tensors) -> Tensor:
        """How much the update has lengthened each row, n / n₀ (d_out,)."""
        s = lora_scale(self.alpha, self.r, rslora=self.rslora)
        a, b = t["A"], t["B"]
        w_a = site.matmul(a.to(site.dtype)).to(a.dtype).T
        grown = ((2 * s * w_a + s**2 * (b @ (a @ a.T))) * b).sum(1)
        return (1 + grown / t["n0"] ** 2).clamp_min(SMALLEST_NORM).sqrt()

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        s = lora_scale(self.alpha, self.r, rslora=self.rslora)
        h = linear(dropout(x, self.dropout, site.training), t["A"].to(y.dtype))
        update = linear(s * h, t["B"].to(y.dtype))
        rho_minus_1 = (t[LENGTHS] / t[GROWTH] - 1).to(y.dtype)
        without_bias = y - site.bias().to(y.dtype) if site.has_bias else y
        return update + rho_minus_1 * (without_bias + update)

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)

    def macs_per_forward(self, site: Site) -> int:
        return self.r * site.d_in * site.d_out + self.r**2 * (site.d_in + site.d_out)
