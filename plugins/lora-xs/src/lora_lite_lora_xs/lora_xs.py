"""LoRA-XS: train only an r × r matrix between the frozen leading singular factors of the weight.

    Δy = s · B R A x        A = diag(S) V (r, d_in),  B = U (d_out, r)  frozen,  R (r, r)  trained        s = α / r

U, S, V are the top-r singular triplets of W. Since A x = Uᵀ (W x) = Bᵀ (y - b), where d_out ≤ d_in it is cheaper to leave
A and x alone:

    Δy = s · B R Bᵀ (y - b)

Start: R = 0, so Δ is bitwise 0, and R has a gradient.

Bałazy et al. 2024, arXiv:2405.17604.
"""

from typing import ClassVar, Literal

import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant, check_rank, top_r_svd
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor


class LoRAXS(Variant, name="lora_xs"):
    """A trained r × r core between frozen singular factors, Δy = s · B R A x.

    Attributes:
        r: how many singular directions, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale is alpha / r; None means alpha = r, so scale 1.
        svd: how they are found; see `lora_lite.top_r_svd`.
    """

    recommended_lr: ClassVar[float] = 4e-3

    r: PositiveInt = 32
    alpha: PositiveFloat | None = None
    svd: Literal["randomized", "exact"] = "randomized"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        specs = {
            "B": TensorSpec((site.d_out, self.r), trainable=False, derived=True),
            "R": TensorSpec((self.r, self.r)),
        }
        if not _from_output(site):
            specs["A"] = TensorSpec((self.r, site.d_in), trainable=False, derived=True)
        return specs

    def derive(self, site: Site) -> dict[str, Tensor]:
        u, s, v = top_r_svd(site.weight(), self.r, self.svd)
        return {"B": u} if _from_output(site) else {"B": u, "A": s[:, None] * v}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"R": torch.zeros(self.r, self.r)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        if site.has_bias and _from_output(site):
            return {"b B": site.bias().to(t["B"].dtype) @ t["B"]}
        return {}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        if not _from_output(site):
            z = x @ t["A"].T
        elif site.has_bias:
            z = y @ t["B"] - t["b B"]
        else:
            z = y @ t["B"]
        scale = 1.0 if self.alpha is None else self.alpha / self.r
        return scale * (z @ t["R"].T) @ t["B"].T

    def macs_per_token(self, site: Site) -> int:
        route = 2 * self.r * site.d_out if _from_output(site) else self.r * (site.d_in + site.d_out)
        return route + self.r**2

    def macs_per_forward(self, site: Site) -> int:
        return self.r * site.d_out if site.has_bias and _from_output(site) else 0


def _from_output(site: Site) -> bool:
    """Whether Δ is computed from y, which takes 2 r d_out MACs instead of r (d_in + d_out)."""
    return site.d_out <= site.d_in
