"""The forward that OLoRA, MiLoRA, CorDA and LoRA-GA share: LoRA, moved away from where it starts.

    W' = W + s (B A - B₀ A₀)        A (r, d_in), B (d_out, r)        s = α / r

Each method says which part s B₀ A₀ of W training begins with; see starts.py and lora_ga.py. The
base weight is not written: the papers' residual W - s B₀ A₀ never appears. Trained are the offsets
dA = A - A₀ and dB = B - B₀:

    Δy = s · (dB A₀ x + (B₀ + dB) dA x)

Start: dA = dB = 0, so Δ is bitwise 0, and both have a gradient. Weight decay pulls to the
pretrained weight. On a weight of zeros nothing has a gradient, ever: A₀ or B₀ A₀ is 0 as well.
"""

from typing import ClassVar

import torch
from lora_lite.author import (
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    lora_scale,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear


class Offsets(Variant):
    """Trained factors of a part of the weight, W' = W + s (B A - B₀ A₀)."""

    recommended_lr: ClassVar[float] = 1e-3
    from_weight_alone: ClassVar[bool] = True

    r: PositiveInt = 8
    alpha: PositiveFinite | None = None

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        return {
            "A0": TensorSpec(a, trainable=False, derived=self.from_weight_alone),
            "B0": TensorSpec(b, trainable=False, derived=self.from_weight_alone),
            "dA": TensorSpec(a),
            "dB": TensorSpec(b),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"dA": torch.zeros(self.r, site.d_in), "dB": torch.zeros(site.d_out, self.r)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        s = lora_scale(self.alpha, self.r)
        start = linear(s * linear(x, t["A0"]), t["dB"])
        change = linear(s * linear(x, t["dA"]), t["B0"] + t["dB"])
        return start + change

    def macs_per_token(self, site: Site) -> int:
        return 2 * self.r * (site.d_in + site.d_out)
