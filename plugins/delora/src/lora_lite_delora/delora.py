"""DeLoRA: LoRA whose rank-1 terms have unit length, so that one learned number, λ, sets the strength of the update.

    W' = W + λ/r Σ_i (b_i / ‖b_i‖) (a_i / ‖a_i‖)ᵀ diag(w)        a_i row of A (r, d_in),  b_i column of B (d_out, r)

w is frozen: the norms of W's columns, w_j = ‖W[:, j]‖, or one Frobenius norm ‖W‖ for all. So ‖W' - W‖ ≤ λ max w. Norms of a_i
and b_i below 1e-4 count as 1e-4. λ is stored as its offset from `strength`. Scaled to unit length once a forward, in at least
float32, the factors make a plain low-rank update:

    Δy = B̂ Â x        Â = λ/r · rows(A)/‖a_i‖ · diag(w),  B̂ = columns(B)/‖b_i‖

Start "zero_b": A uniform in ±1/√d_in, B = 0. Δ is bitwise 0, but the first optimizer step makes b_i longer than 1e-4, and Δ
jumps to the strength that λ allows. Only B has a gradient at that step, a very large one: use Adam.

Start "subtract": A₀ uniform in ±1/√d_in, B₀ in ±1/√r, and the term that they make is subtracted for good. Trained are
dA = A - A₀ and dB = B - B₀. Δ is bitwise 0, all have gradients at once, nothing jumps; twice the work.

Bini, Girrbach and Akata 2025, arXiv:2503.18225. The paper has the norm "scalar" and the start "subtract"; its published code
the norm "channel", and common implementations the start "zero_b".
"""

import math
from typing import ClassVar, Literal

import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant, check_rank
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import linear

SMALLEST_NORM = 1e-4


class DeLoRA(Variant, name="delora"):
    """A low-rank update of unit terms and learned strength.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        strength: λ at the start, > 0 (at 0 nothing would ever get a gradient).
        norm: the frozen scale: "channel" is the norm of every column of W, "scalar" the Frobenius norm of W.
        start: how Δ = 0 is reached: "zero_b" by B = 0, "subtract" by subtracting the initial term.
    """

    recommended_lr: ClassVar[float] = 2e-3

    r: PositiveInt = 8
    strength: PositiveFloat = 15.0
    norm: Literal["channel", "scalar"] = "channel"
    start: Literal["zero_b", "subtract"] = "zero_b"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        precise = torch.promote_types(site.dtype, torch.float32)
        width = site.d_in if self.norm == "channel" else 1
        shared = {
            "w": TensorSpec(
                (width,), trainable=False, derived=True, dtype=precise, compute="float32"
            ),
            "lambda_offset": TensorSpec((1,), decay=False, compute="float32"),
        }
        if self.start == "zero_b":
            return {
                "A": TensorSpec(a, compute="float32"),
                "B": TensorSpec(b, compute="float32"),
                **shared,
            }
        return {
            "A0": TensorSpec(a, trainable=False, compute="float32"),
            "B0": TensorSpec(b, trainable=False, compute="float32"),
            "dA": TensorSpec(a, compute="float32"),
            "dB": TensorSpec(b, compute="float32"),
            **shared,
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        w = site.weight()
        precise = torch.promote_types(w.dtype, torch.float32)
        columns = torch.linalg.vector_norm(w, dim=0, dtype=precise)
        return {
            "w": columns if self.norm == "channel" else torch.linalg.vector_norm(columns).reshape(1)
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a = torch.empty(self.r, site.d_in).uniform_(-1, 1, generator=rng("A")) / math.sqrt(
            site.d_in
        )
        b = torch.zeros(site.d_out, self.r)
        if self.start == "zero_b":
            return {"A": a, "B": b, "lambda_offset": torch.zeros(1)}
        b0 = torch.empty(site.d_out, self.r).uniform_(-1, 1, generator=rng("B")) / math.sqrt(self.r)
        return {
            "A0": a,
            "B0": b0,
            "dA": torch.zeros_like(a),
            "dB": b,
            "lambda_offset": torch.zeros(1),
        }

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        strength = self.strength + t["lambda_offset"]
        if self.start == "zero_b":
            return self._unit_terms(t["A"], t["B"], strength, t["w"])
        now = self._unit_terms(t["A0"] + t["dA"], t["B0"] + t["dB"], strength, t["w"])
        start = self._unit_terms(t["A0"], t["B0"], torch.full_like(strength, self.strength), t["w"])
        return {**now, **{f"{name} start": value for name, value in start.items()}}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        update = linear(linear(x, t["unit A"].to(y.dtype)), t["unit B"].to(y.dtype))
        if self.start == "zero_b":
            return update
        return update - linear(
            linear(x, t["unit A start"].to(y.dtype)), t["unit B start"].to(y.dtype)
        )

    def macs_per_token(self, site: Site) -> int:
        return (1 if self.start == "zero_b" else 2) * self.r * (site.d_in + site.d_out)

    def _unit_terms(self, a: Tensor, b: Tensor, strength: Tensor, w: Tensor) -> dict[str, Tensor]:
        length_a = torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        length_b = torch.linalg.vector_norm(b, dim=0).clamp_min(SMALLEST_NORM)
        return {"unit A": strength / self.r * a / length_a * w, "unit B": b / length_b}
