"""AntiPaSTO: shift the largest singular values of a weight, and turn its singular vectors a little.

    W  = U diag(S) V + W_res                         frozen: U (d_out, r), S (r), V (r, d_in)
    W' = U R_uᵀ diag(S + c δ) R_v V + W_res          and the rest, W_res, never built; see basis.py

    Δy = U K (V x),       K = R_uᵀ diag(S + c δ) R_v - diag(S)

The rotations R = R(c θ) are block-diagonal, with blocks of bs x bs. With E = R - I no large terms
are subtracted, and K is exactly 0 at the start:

    K = c diag(δ) + diag(S + c δ) E_v + E_uᵀ diag(S + c δ) R_v       block-diagonal like R

R is the Cayley transform of a skew matrix X, so that R(-c) = R(c)⁻¹:

    R = (I - X)⁻¹ (I + X),        E = (I - X)⁻¹ 2 X
    X_ij = -X_ji = c/2 · a tanh(θ / 2a),    a = 2 tan(max_angle / 2)

Start: δ = 0, θ = 0, so Δ is bitwise 0 and both have a gradient. On a weight of zeros θ has one from
the second step on, when S + δ is no longer 0.

AntiPaSTO: 2026, arXiv:2601.07473.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import PositiveFinite, Rng, Site, SiteError, Tensors, TensorSpec
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from lora_lite_antipasto.basis import SingularVariant

# What `prepare` computes: K, its blocks (r / bs, bs, bs), or its diagonal (r,) without a rotation.
CORE = "K"


class AntiPaSTO(SingularVariant, name="antipasto"):
    """Frozen singular vectors with learned singular values and rotations.

    Of `SingularVariant`: r, basis, svd, select.

    Attributes:
        rotate_basis: the side to rotate: the input's "V", the output's "U", "both", or "none".
        block_size: of the rotations, at least 2, a divisor of r where there is a rotation;
            neighbours in the order of singular values share a block.
        max_angle: limit of one rotation in radians, in (0, π): exact for blocks of 2, a soft limit
            of each plane else.
    """

    recommended_lr: ClassVar[float] = 5e-3

    rotate_basis: Literal["V", "U", "both", "none"] = "V"
    block_size: Annotated[int, Field(ge=2)] = 4
    max_angle: Annotated[PositiveFinite, Field(lt=math.pi)] = 0.5

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        specs = {**self.frozen(site), "delta": TensorSpec((self.r,), compute="float32")}
        if self.rotate_basis != "none" and self.r % self.block_size:
            raise SiteError("r", f"{self.r} is not a multiple of block_size={self.block_size}")
        planes = (self.r // self.block_size, self.block_size * (self.block_size - 1) // 2)
        if self.rotate_basis in ("U", "both"):
            specs["theta_U"] = TensorSpec(planes, compute="float32")
        if self.rotate_basis in ("V", "both"):
            specs["theta_V"] = TensorSpec(planes, compute="float32")
        return specs

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        specs = self.tensors(site)
        trained = {name: torch.zeros(spec.shape) for name, spec in specs.items() if spec.trainable}
        return {**self.from_data(site, statistics), **trained}

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        delta = scale * t["delta"]
        if self.rotate_basis == "none":
            return {CORE: delta}
        delta = delta.reshape(-1, self.block_size)
        shifted = t["S"].reshape(-1, self.block_size) + delta
        k = torch.diag_embed(delta)
        turned = torch.diag_embed(shifted)  # diag(S + c δ) R_v
        if "theta_V" in t:
            from_v = shifted[..., None] * self.rotation_minus_identity(t["theta_V"], scale)
            k = k + from_v
            turned = turned + from_v
        if "theta_U" in t:
            k = k + self.rotation_minus_identity(t["theta_U"], scale).mT @ turned
        return {CORE: k}

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        z = self.coordinates(t, x)
        k = t[CORE].to(z.dtype)
        if self.rotate_basis == "none":
            return linear(k * z, t["U"])
        blocks = z.reshape(*z.shape[:-1], self.r // self.block_size, self.block_size)
        return linear(torch.einsum("gij,...gj->...gi", k, blocks).flatten(-2), t["U"])

    def rotation_minus_identity(self, theta: Tensor, scale: float) -> Tensor:
        """E = R - I (r / bs, bs, bs), from the angles θ (r / bs, bs (bs - 1) / 2) of its planes."""
        limit = 2 * math.tan(self.max_angle / 2)
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=theta.device)
        upper = theta.new_zeros(len(theta), self.block_size, self.block_size)
        upper[:, rows, columns] = scale / 2 * limit * torch.tanh(theta / 2 / limit)
        x = upper - upper.mT
        identity = torch.eye(self.block_size, dtype=theta.dtype, device=theta.device)
        e: Tensor = torch.linalg.solve(identity - x, 2 * x)
        return e

    def macs_per_token(self, site: Site) -> int:
        blocks = 0 if self.rotate_basis == "none" else self.r * self.block_size
        return self.macs_of_basis(site) + blocks

    def macs_per_forward(self, site: Site) -> int:
        return self.r * self.block_size**2 if self.rotate_basis in ("U", "both") else 0
