"""PiSSA: LoRA that starts as the top-r part of the weight, so that training moves that part.

    W' = W + s (B A - B₀ A₀)        A (r, d_in), B (d_out, r)        s = α / r
    B₀ = U √(S/s),  A₀ = √(S/s) V

U, S, V are the top-r singular triplets of W, so s B₀ A₀ is the principal part. The base weight is
not written: the paper's residual W - s B₀ A₀ never appears. Trained are the offsets dA = A - A₀ and
dB = B - B₀:

    Δy = s · (dB A₀ x + (B₀ + dB) dA x)

which loses nothing to rounding where two near-equal products would be subtracted. Weight decay
pulls to the pretrained weight. The two terms are one pair of products, with the factors stacked:

    Δy = s · (dB | B₀ + dB) (A₀ ; dA) x

Start: dA = dB = 0, so Δ is bitwise 0, and both have a gradient. It does not depend on how exact the
decomposition is. On a weight of zeros nothing has a gradient, ever: A₀ and B₀ are 0 as well.

Meng, Wang and Zhang 2024, arXiv:2404.02948.
"""

from typing import ClassVar, Literal

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
    top_r_svd,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import dropout, linear

# What `prepare` computes: the stacked factors, (2r, d_in) and (d_out, 2r).
DOWN = "A0_dA"
UP = "dB_B"


class PiSSA(Variant, name="pissa"):
    """Trained principal factors, W' = W + s (B A - B₀ A₀).

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale s is alpha / r; None means alpha = r, so scale 1, as in the paper.
        svd: how the principal part is found; see `lora_lite.author.top_r_svd`.
        dropout: probability of dropping an entry of x on its way to A and A₀ alike, in training
            mode. The paper has none.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8
    alpha: PositiveFinite | None = None
    svd: Literal["randomized", "exact"] = "randomized"
    dropout: DropoutRate = 0.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        return {
            "A0": TensorSpec(a, trainable=False, derived=True),
            "B0": TensorSpec(b, trainable=False, derived=True),
            "dA": TensorSpec(a),
            "dB": TensorSpec(b),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        u, s, v = top_r_svd(site.weight(), self.r, self.svd, layer=site.path)
        root = (s / lora_scale(self.alpha, self.r)).sqrt()
        return {"A0": root[:, None] * v, "B0": u * root}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"dA": torch.zeros(self.r, site.d_in), "dB": torch.zeros(site.d_out, self.r)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return {
            DOWN: torch.cat([t["A0"], t["dA"]]),
            UP: torch.cat([t["dB"], t["B0"] + t["dB"]], dim=1),
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        s = lora_scale(self.alpha, self.r)
        x = dropout(x, self.dropout, site.training)
        return linear(s * linear(x, t[DOWN]), t[UP])

    def macs_per_token(self, site: Site) -> int:
        return 2 * self.r * (site.d_in + site.d_out)
