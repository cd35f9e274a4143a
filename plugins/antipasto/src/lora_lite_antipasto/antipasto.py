"""AntiPaSTO: shift the top-r singular values of the weight by δ, and turn its singular basis by small learned rotations.

    W = U diag(S) V + W_res          frozen: r singular triplets U (d_out, r), S (r), V (r, d_in), and the rest; see basis.py
    W' = U R_uᵀ diag(S + c δ) R_v V + W_res                   R = R(c θ): block-diagonal, orthogonal, blocks of bs x bs

With E = R - I, exactly 0 at the start, and z = Uᵀ (y - b) = S ⊙ V x:

    Δy = U K diag(1/S) z,       K = diag(S) E_v + c diag(δ) R_v + E_uᵀ diag(S + c δ) R_v        (block-diagonal like R)

R is the Cayley transform of a skew matrix with entries limited by tanh: R = (I - X)⁻¹ (I + X), E = (I - X)⁻¹ 2 X,
X = c/2 · a tanh(A / a), A skew with entries ±θ/2, a = 2 tan(max_angle / 2). So R(-c) = R(c)⁻¹.

Start: δ = 0, θ = 0, so Δ is bitwise 0 and both have a gradient.

AntiPaSTO: 2026, arXiv:2601.07473.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite import Site, SiteError, Tensors, TensorSpec
from pydantic import Field
from torch import Tensor

from lora_lite_antipasto.basis import SelectingCore, inverse


class AntiPaSTO(SelectingCore, name="antipasto"):
    """Frozen singular basis with learned singular values and rotations. Of `SelectingCore`: r, basis, select, svd.

    Attributes:
        rotate_basis: the side to rotate: the input's "V", the output's "U", "both", or "none".
        block_size: of the rotations, at least 2, a divisor of r where there is a rotation; neighbours in the order of singular
            values share a block.
        max_angle: limit of one rotation in radians, in (0, π): exact for blocks of 2, a soft limit of each plane else.
    """

    recommended_lr: ClassVar[float] = 5e-3

    rotate_basis: Literal["V", "U", "both", "none"] = "V"
    block_size: Annotated[int, Field(ge=2)] = 4
    max_angle: Annotated[float, Field(gt=0, lt=math.pi)] = 0.5

    def core_tensors(self) -> dict[str, TensorSpec]:
        if self._rotations and self.r % self.block_size:
            raise SiteError("r", f"{self.r} is not a multiple of block_size={self.block_size}")
        planes = (self.r // self.block_size, self.block_size * (self.block_size - 1) // 2)
        thetas = {
            f"theta_{side}": TensorSpec(planes, compute="float32") for side in self._rotations
        }
        return {"delta": TensorSpec((self.r,), compute="float32"), **thetas}

    def core(self, t: Tensors, scale: float) -> dict[str, Tensor]:
        """L = K diag(1/S): shape (r / bs, bs, bs), or (r,) without a rotation."""
        s, delta, inverse_s = t["S"], scale * t["delta"], inverse(t["S"])
        if not self._rotations:
            return {"L": delta * inverse_s}
        s, delta, inverse_s = (v.reshape(-1, self.block_size) for v in (s, delta, inverse_s))
        k = torch.diag_embed(delta)
        turned = torch.diag_embed(s + delta)
        if "theta_V" in t:
            e_v = self._rotation_minus_identity(t["theta_V"], scale)
            k = k + (s + delta)[..., None] * e_v
            turned = turned + (s + delta)[..., None] * e_v
        if "theta_U" in t:
            e_u = self._rotation_minus_identity(t["theta_U"], scale)
            k = k + (e_u.mT @ turned if "theta_V" in t else e_u.mT * (s + delta)[:, None, :])
        return {"L": k * inverse_s[:, None, :]}

    def through(self, t: Tensors, z: Tensor) -> Tensor:
        core = t["L"].to(z.dtype)
        if not self._rotations:
            return core * z
        blocks = z.reshape(*z.shape[:-1], self.r // self.block_size, self.block_size)
        return torch.einsum("...gj,gij->...gi", blocks, core).flatten(-2)

    def macs_per_token(self, site: Site) -> int:
        return super().macs_per_token(site) + (self.r * self.block_size if self._rotations else 0)

    def macs_per_forward(self, site: Site) -> int:
        return super().macs_per_forward(site) + (
            self.r * self.block_size**2 if self.rotate_basis == "both" else 0
        )

    @property
    def _rotations(self) -> tuple[str, ...]:
        return {"V": ("V",), "U": ("U",), "both": ("U", "V"), "none": ()}[self.rotate_basis]

    def _rotation_minus_identity(self, theta: Tensor, scale: float) -> Tensor:
        """E = R - I, shape (blocks, bs, bs), from the planes' angles θ (blocks, bs (bs - 1) / 2)."""
        limit = 2 * math.tan(self.max_angle / 2)
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=theta.device)
        upper = theta.new_zeros(len(theta), self.block_size, self.block_size)
        upper[:, rows, columns] = scale / 2 * limit * torch.tanh(theta / 2 / limit)
        x = upper - upper.mT
        identity = torch.eye(self.block_size, dtype=theta.dtype, device=theta.device)
        rotation: Tensor = torch.linalg.solve(identity - x, 2 * x)
        return rotation
