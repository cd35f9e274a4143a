"""DeLoRA: LoRA with terms of unit length, so that one learned number, λ, sets the strength.

    W' = W + λ/r Σ_i (b_i / ‖b_i‖) (a_i / ‖a_i‖)ᵀ diag(w)        a_i row of A (r, d_in)
                                                                 b_i column of B (d_out, r)

w is frozen: the norms of W's columns, w_j = ‖W[:, j]‖, or one Frobenius norm ‖W‖ for all. So
‖W' - W‖ ≤ λ max w. Norms of a_i and b_i below 1e-4 count as 1e-4. λ is stored as its offset from
`strength`. Scaled to unit length once a forward, in at least float32, the factors make a plain
low-rank update:

    Δy = B̂ (Â x)        Â = λ/r · rows(A)/‖a_i‖ · diag(w),  B̂ = columns(B)/‖b_i‖

Start "subtract", the paper's: A₀ uniform in ±1/√d_in, B₀ in ±1/√r, and the term that they make is
subtracted for good. Trained are dA = A - A₀ and dB = B - B₀. Δ is bitwise 0, all have gradients at
once, nothing jumps; twice the products of "zero_b". No near-equal products are subtracted:

    Δy = (B̂ - B̂₀) (Â₀ x) + B̂ ((Â - Â₀) x)

Start "zero_b": A uniform in ±1/√d_in, B = 0. Δ is bitwise 0, but the first optimizer step makes b_i
longer than 1e-4, and Δ jumps to the strength that λ allows. Only B has a gradient at that step, one
ten thousand times too large, which Adam's second moment remembers for thousands of steps.

On a weight of zeros w is 0 and nothing has a gradient, ever.

Bini, Girrbach and Akata 2025, arXiv:2503.18225. The paper has the norm "scalar" and the start
"subtract"; its published code the norm "channel"; common implementations the start "zero_b".
"""

from typing import ClassVar, Literal

import torch
from lora_lite.author import (
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    uniform_start,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

SMALLEST_NORM = 1e-4

# What `prepare` computes: Â (r, d_in) and B̂ (d_out, r); with "subtract" also Â₀, Â - Â₀ and B̂ - B̂₀.
UNIT_A = "unit_A"
UNIT_B = "unit_B"
START_A = "start_A"
CHANGE_A = "change_A"
CHANGE_B = "change_B"


class DeLoRA(Variant, name="delora"):
    """A low-rank update of unit terms and learned strength.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        strength: λ at the start, > 0 (at 0 nothing would ever get a gradient).
        norm: the frozen scale: "channel" is the norm of every column of W, "scalar" the Frobenius
            norm of W.
        start: how Δ = 0 is reached: "subtract" by subtracting the initial term, "zero_b" by B = 0.
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: PositiveInt = 8
    strength: PositiveFinite = 15.0
    norm: Literal["channel", "scalar"] = "channel"
    start: Literal["subtract", "zero_b"] = "subtract"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        # Without decay: of a row of A and a column of B only the direction counts.
        if self.start == "zero_b":
            specs = {
                "A": TensorSpec(a, decay=False, compute="float32"),
                "B": TensorSpec(b, decay=False, compute="float32"),
            }
        else:
            specs = {
                "A0": TensorSpec(a, trainable=False, compute="float32"),
                "B0": TensorSpec(b, trainable=False, compute="float32"),
                "dA": TensorSpec(a, decay=False, compute="float32"),
                "dB": TensorSpec(b, decay=False, compute="float32"),
            }
        width = (site.d_in,) if self.norm == "channel" else (1,)
        precise = torch.promote_types(site.dtype, torch.float32)
        specs["w"] = TensorSpec(
            width, trainable=False, derived=True, dtype=precise, compute="float32"
        )
        specs["lambda_offset"] = TensorSpec((1,), decay=False, compute="float32")
        return specs

    def derive(self, site: Site) -> dict[str, Tensor]:
        w = site.weight()
        precise = torch.promote_types(w.dtype, torch.float32)
        columns = torch.linalg.vector_norm(w, dim=0, dtype=precise)
        if self.norm == "channel":
            return {"w": columns}
        return {"w": torch.linalg.vector_norm(columns).reshape(1)}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a = uniform_start((self.r, site.d_in), rng("A"))
        b = torch.zeros(site.d_out, self.r)
        if self.start == "zero_b":
            return {"A": a, "B": b, "lambda_offset": torch.zeros(1)}
        return {
            "A0": a,
            "B0": uniform_start((site.d_out, self.r), rng("B")),
            "dA": torch.zeros_like(a),
            "dB": b,
            "lambda_offset": torch.zeros(1),
        }

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        strength = self.strength + t["lambda_offset"]
        if self.start == "zero_b":
            a, b = self.unit_terms(t["A"], t["B"], strength, t["w"])
            return {UNIT_A: a, UNIT_B: b}
        at_start = torch.full_like(strength, self.strength)
        a, b = self.unit_terms(t["A0"] + t["dA"], t["B0"] + t["dB"], strength, t["w"])
        a0, b0 = self.unit_terms(t["A0"], t["B0"], at_start, t["w"])
        return {START_A: a0, CHANGE_A: a - a0, UNIT_B: b, CHANGE_B: b - b0}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        if self.start == "zero_b":
            return product(x, t[UNIT_A], t[UNIT_B])
        return product(x, t[START_A], t[CHANGE_B]) + product(x, t[CHANGE_A], t[UNIT_B])

    def unit_terms(
        self, a: Tensor, b: Tensor, strength: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Â and B̂."""
        length_a = torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        length_b = torch.linalg.vector_norm(b, dim=0).clamp_min(SMALLEST_NORM)
        return strength / self.r * a / length_a * w, b / length_b

    def macs_per_token(self, site: Site) -> int:
        terms = 1 if self.start == "zero_b" else 2
        return terms * self.r * (site.d_in + site.d_out)


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B (A x), in x's dtype."""
    return linear(linear(x, a.to(x.dtype)), b.to(x.dtype))
