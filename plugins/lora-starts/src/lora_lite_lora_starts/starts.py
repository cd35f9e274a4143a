"""OLoRA, MiLoRA and CorDA: which part of the weight LoRA starts from.

    OLoRA     W = Q R         B₀ = Q_r,        A₀ = R_r              the first r of both
    MiLoRA    W = U S V       B₀ = U √(S/s),   A₀ = √(S/s) V         the r smallest
    CorDA     W C = U S V     B₀ = U √(S/s),   A₀ = √(S/s) V C⁻¹     the r smallest or largest

C = E[x xᵀ] on calibration data. What follows from these parts is in offsets.py.

Q_r depends on the first r columns of W alone, so no more of W is decomposed; R_r = Q_rᵀ W.
C is not inverted, since V C⁻¹ = S⁻¹ Uᵀ W. C is damped by 1 % of the mean of its diagonal.

OLoRA: Büyükakyüz 2024, arXiv:2406.01775. MiLoRA: Wang et al. 2024, arXiv:2406.09044. CorDA: Yang et
al. 2024, arXiv:2406.05223.
"""

from typing import ClassVar, Literal

import torch
from lora_lite.author import Observer, Rng, Site, Tensors, lora_scale, row_signs
from torch import Tensor

from lora_lite_lora_starts.offsets import Offsets

# Of the mean of C's diagonal, added to it, so that unused inputs have a direction too.
DAMPING = 0.01


def as_float32(w: Tensor) -> Tensor:
    """In at least float32, for decompositions."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


class OLoRA(Offsets, name="olora"):
    """LoRA from an orthonormal basis of the weight's first r columns.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale s is alpha / r; None means alpha = r, so scale 1.
    """

    def derive(self, site: Site) -> dict[str, Tensor]:
        w = as_float32(site.weight())
        q, corner = torch.linalg.qr(w[:, : self.r])
        q = q * torch.where(corner.diagonal() < 0, -1.0, 1.0).to(q)
        return {"A0": q.T @ w, "B0": q}


class MiLoRA(Offsets, name="milora"):
    """LoRA from the weight's r smallest singular triplets, so that the principal ones stay.

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale s is alpha / r; None means alpha = r, so scale 1.
    """

    def derive(self, site: Site) -> dict[str, Tensor]:
        u, s, v = torch.linalg.svd(as_float32(site.weight()), full_matrices=False)
        u, s, v = u[:, -self.r :], s[-self.r :], v[-self.r :]
        signs = row_signs(v)
        root = (s / lora_scale(self.alpha, self.r)).sqrt()
        return {"A0": root[:, None] * v * signs, "B0": u * signs.T * root}


class SecondMoment:
    """Gathers Σ x xᵀ and the number of rows, in float64."""

    def __init__(self, d_in: int) -> None:
        self.total = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.rows = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds the rows of x (rows, d_in)."""
        x = x.double()
        self.total = self.total.to(x.device) + x.T @ x
        self.rows += len(x)

    def result(self) -> dict[str, Tensor]:
        """C (d_in, d_in)."""
        return {"C": self.total / max(self.rows, 1)}


class CorDA(Offsets, name="corda"):
    """LoRA from a part of the weight that calibration data choose.

    It needs calibration data (`attach(..., calibration=...)`).

    Attributes:
        r: the rank, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale s is alpha / r; None means alpha = r, so scale 1.
        part: "smallest" trains what the data use least, so give data of what is to be kept;
            "largest" trains what they use most, so give data of what is to be learned.
    """

    from_weight_alone: ClassVar[bool] = False

    part: Literal["smallest", "largest"] = "smallest"

    def observe(self, site: Site) -> Observer:
        return SecondMoment(site.d_in)

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        w, c = site.weight().double(), statistics["C"].to(site.weight().device)
        c = c + DAMPING * c.diagonal().mean() * torch.eye(site.d_in).to(c)
        u, s, _ = torch.linalg.svd(w @ c, full_matrices=False)
        chosen = slice(-self.r, None) if self.part == "smallest" else slice(self.r)
        u, s = u[:, chosen], s[chosen]
        u = u * row_signs(u.T).T
        scale = lora_scale(self.alpha, self.r)
        root = (s / scale).sqrt()
        inverse = torch.where(root > 0, 1 / (scale * root), 0.0)
        start = {"A0": inverse[:, None] * (u.T @ w), "B0": u * root}
        return {**start, **super().init(site, derived, statistics, rng)}
