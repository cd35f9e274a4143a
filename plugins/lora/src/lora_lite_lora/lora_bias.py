"""LoRA with a bias: add a learned vector to the output beside the rank-r matrix.

    Δy = s · (B (A x) + c)        A (r, d_in), B (d_out, r), c (d_out,)        s as in LoRA

It is what PEFT calls `lora_bias`, and how biases that were trained beside a LoRA (`bias="all"`) are
read. A LoRA alone is served by more programs.

Start: A uniform in ±1/√d_in, B = 0 and c = 0, so Δ is bitwise 0; at the first step B and c have
gradients. A weight of zeros changes nothing in this.

Hu et al. 2021, arXiv:2106.09685, section 4.1 leaves the biases alone; training them as well is from
the library PEFT.
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec, lora_scale
from torch import Tensor
from torch.nn.functional import dropout, linear

from lora_lite_lora.lora import LoRA


class LoRABias(LoRA, name="lora_bias"):
    """Low-rank update and offset, Δy = s · (B (A x) + c).

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale is alpha / r.
        rslora: scale by alpha / √r instead, so that the update does not shrink as r grows.
        dropout: probability of dropping an entry of x on its way to A, in training mode.
    """

    acts_on_bias: ClassVar[bool] = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {**super().tensors(site), "c": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {**super().init(site, derived, statistics, rng), "c": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        s = lora_scale(self.alpha, self.r, rslora=self.rslora)
        reduced = linear(dropout(x, self.dropout, site.training), t["A"])
        return linear(s * reduced, t["B"], s * t["c"])
