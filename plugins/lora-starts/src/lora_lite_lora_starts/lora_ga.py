"""LoRA-GA: LoRA that starts along the gradient of the weight.

    G = dL/dW = U S V        B₀ = ζ U[:, r:2r],   A₀ = ζ V[:r]        ζ = d_out^¼ / √γ

G is summed over calibration data, for a loss of the user's. The first step of B then follows the r
largest singular directions of G, and that of A the next r, so that together they come as close to
a step of full fine-tuning as rank 2 r allows. What follows from A₀ and B₀ is in offsets.py.

G is 0 where no gradient arrives: then the directions are arbitrary, and training starts from there.

Wang et al. 2024, arXiv:2407.05000.
"""

from typing import ClassVar, Literal

import torch
from lora_lite.author import (
    GradientObserver,
    PositiveFinite,
    Rng,
    Site,
    SiteError,
    Tensors,
    TensorSpec,
    row_signs,
)
from torch import Tensor

from lora_lite_lora_starts.offsets import Offsets


class WeightGradient:
    """Gathers Σ grad_yᵀ x, the gradient of W, in at least float32."""

    wants_gradients: ClassVar[Literal[True]] = True

    def __init__(self, d_out: int, d_in: int) -> None:
        self.total = torch.zeros(d_out, d_in)

    def update(self, x: Tensor, y: Tensor, grad_y: Tensor) -> None:
        """Adds the rows of x (rows, d_in) and grad_y (rows, d_out)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.total = self.total.to(x.device, dtype) + grad_y.to(dtype).T @ x.to(dtype)

    def result(self) -> dict[str, Tensor]:
        """G (d_out, d_in)."""
        return {"G": self.total}


class LoRAGA(Offsets, name="lora_ga"):
    """LoRA from the singular directions of the weight's gradient.

    It needs calibration data with a loss (`attach(..., calibration=..., loss=...)`).

    Attributes:
        r: the rank, 1 ≤ 2 r ≤ min(d_in, d_out).
        alpha: the scale s is alpha / r; None means alpha = r, so scale 1.
        gamma: γ, by which A₀ and B₀ are divided; a larger one trains more slowly.
    """

    from_weight_alone: ClassVar[bool] = False

    gamma: PositiveFinite = 16.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if 2 * self.r > min(site.d_in, site.d_out):
            raise SiteError("r", f"2 r = {2 * self.r} directions are more than this layer has")
        return super().tensors(site)

    def observe(self, site: Site) -> GradientObserver:
        return WeightGradient(site.d_out, site.d_in)

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        u, _, v = torch.linalg.svd(statistics["G"], full_matrices=False)
        signs = row_signs(v)  # (rows, 1)
        u, v = u * signs.T, v * signs
        zeta = site.d_out**0.25 / self.gamma**0.5
        start = {"A0": zeta * v[: self.r], "B0": zeta * u[:, self.r : 2 * self.r]}
        return {**start, **super().init(site, derived, statistics, rng)}
