"""AntiPaSTO: shift the top-r singular values of the weight by δ, and turn its singular basis by small learned rotations.

    W = U diag(S) V + W_res          frozen: the top-r singular triplets U (d_out, r), S (r), V (r, d_in), and the rest
    W' = U R_uᵀ diag(S + c δ) R_v V + W_res                   R = R(c θ): block-diagonal, orthogonal, blocks of bs x bs

Neither W_res nor W' is ever built. With E = R - I, exactly 0 at the start, and h = V x:

    Δy = U K h,       K = diag(S) E_v + c diag(δ) R_v + E_uᵀ diag(S + c δ) R_v        (block-diagonal like the rotations)

and since Uᵀ (y - b) = S ⊙ h, where d_out ≤ d_in it is cheaper to leave V and x alone:

    Δy = U K diag(1/S) Uᵀ (y - b)

R is the Cayley transform of a skew matrix with entries limited by tanh: R = (I - X)⁻¹ (I + X), E = (I - X)⁻¹ 2 X,
X = c/2 · a tanh(A / a), A skew with entries ±θ/2, a = 2 tan(max_angle / 2). So R(-c) = R(c)⁻¹.

Start: δ = 0, θ = 0, so Δ is bitwise 0 and both have a gradient.

AntiPaSTO: 2026, arXiv:2601.07473. Choice of directions by activation: after Sun et al. 2023 (Wanda), arXiv:2306.11695.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite import CalibrationError, Observer, Rng, Site, SiteError, Tensors, TensorSpec, Variant, check_rank, top_r_svd
from pydantic import Field, PositiveInt
from torch import Tensor


class AntiPaSTO(Variant, name="antipasto"):
    """Frozen top-r singular basis with learned singular values and rotations.

    Attributes:
        r: how many singular directions, at most min(d_in, d_out), a multiple of block_size where there is a rotation.
        rotate_basis: the side to rotate: the input's "V", the output's "U", "both", or "none".
        block_size: of the rotations, at least 2; neighbours in the order of singular values share a block.
        max_angle: limit of one rotation in radians, in (0, π): exact for blocks of 2, a soft limit of each plane else.
        select: which directions: "top" has the largest singular values; "activation" those whose coordinate of the output
            varies most over calibration data (`attach(..., calibration=...)`).
        svd: how "top" finds them; see `lora_lite.top_r_svd`.
    """

    takes_scale: ClassVar[bool] = True
    recommended_lr: ClassVar[float] = 5e-3

    r: PositiveInt = 256
    rotate_basis: Literal["V", "U", "both", "none"] = "V"
    block_size: Annotated[int, Field(ge=2)] = 4
    max_angle: Annotated[float, Field(gt=0, lt=math.pi)] = 0.5
    select: Literal["top", "activation"] = "top"
    svd: Literal["randomized", "exact"] = "randomized"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        if self._rotations and self.r % self.block_size:
            raise SiteError("r", f"{self.r} is not a multiple of block_size={self.block_size}")
        derived = self.select == "top"
        basis = {"U": (site.d_out, self.r)} if _from_output(site) else {"U": (site.d_out, self.r), "V": (self.r, site.d_in)}
        planes = (self.r // self.block_size, self.block_size * (self.block_size - 1) // 2)
        return {
            **{side: TensorSpec(shape, trainable=False, derived=derived) for side, shape in basis.items()},
            "S": TensorSpec((self.r,), trainable=False, derived=derived, dtype=torch.float32, compute="float32"),
            "delta": TensorSpec((self.r,), compute="float32"),
            **{f"theta_{side}": TensorSpec(planes, compute="float32") for side in self._rotations},
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        if self.select == "activation":
            return {}
        return _basis(site, *top_r_svd(site.weight(), self.r, self.svd))

    def init(self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng) -> dict[str, Tensor]:
        start = {name: torch.zeros(s.shape) for name, s in self.tensors(site).items() if s.trainable}
        return start if self.select == "top" else {**start, **self._most_active(site, statistics)}

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        prepared = {"K": self._core(site, t, scale)}
        if site.has_bias and _from_output(site):
            prepared["b U"] = site.bias().to(t["U"].dtype) @ t["U"]
        return prepared

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        if not _from_output(site):
            z = x @ t["V"].T
        elif site.has_bias:
            z = y @ t["U"] - t["b U"]
        else:
            z = y @ t["U"]
        return self._apply(t["K"].to(z.dtype), z) @ t["U"].T

    def observe(self, site: Site) -> Observer | None:
        return OutputMoments(site) if self.select == "activation" else None

    def macs_per_token(self, site: Site) -> int:
        route = 2 * self.r * site.d_out if _from_output(site) else self.r * (site.d_in + site.d_out)
        return route + (self.r * self.block_size if self._rotations else 0)

    def macs_per_forward(self, site: Site) -> int:
        bias = self.r * site.d_out if site.has_bias and _from_output(site) else 0
        return bias + (self.r * self.block_size**2 if self.rotate_basis == "both" else 0)

    @property
    def _rotations(self) -> tuple[str, ...]:
        return {"V": ("V",), "U": ("U",), "both": ("U", "V"), "none": ()}[self.rotate_basis]

    def _core(self, site: Site, t: Tensors, scale: float) -> Tensor:
        """K, or K diag(1/S) where z = S ⊙ h: shape (r / bs, bs, bs), or (r,) without a rotation."""
        s, delta = t["S"], scale * t["delta"]
        inverse = torch.where(s > 1e-6 * s[0], 1 / s, 0) if _from_output(site) else torch.ones_like(s)
        if not self._rotations:
            return delta * inverse
        s, delta, inverse = (v.reshape(-1, self.block_size) for v in (s, delta, inverse))
        k = torch.diag_embed(delta)
        turned = torch.diag_embed(s + delta)
        if "theta_V" in t:
            e_v = self._rotation_minus_identity(t["theta_V"], scale)
            k = k + (s + delta)[..., None] * e_v
            turned = turned + (s + delta)[..., None] * e_v
        if "theta_U" in t:
            e_u = self._rotation_minus_identity(t["theta_U"], scale)
            k = k + (e_u.mT @ turned if "theta_V" in t else e_u.mT * (s + delta)[:, None, :])
        return k * inverse[:, None, :]

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

    def _apply(self, k: Tensor, z: Tensor) -> Tensor:
        """K z for the last dimension of z."""
        if k.ndim == 1:
            return k * z
        blocks = z.reshape(*z.shape[:-1], self.r // self.block_size, self.block_size)
        return torch.einsum("...gj,gij->...gi", blocks, k).flatten(-2)

    def _most_active(self, site: Site, statistics: Tensors) -> dict[str, Tensor]:
        if int(statistics["rows"]) < self.r:
            raise CalibrationError(
                f"{site.path}: select='activation' chooses r={self.r} directions and saw {int(statistics['rows'])} calibration "
                "tokens; give at least as many tokens as directions"
            )
        u, s, v = top_r_svd(site.weight(), min(site.d_in, site.d_out), "exact")
        covariance = statistics["covariance"].to(u)
        variance = ((covariance @ u) * u).sum(0) if _from_output(site) else s**2 * ((v @ covariance) * v).sum(1)
        kept = variance.topk(self.r).indices.sort().values
        return _basis(site, u[:, kept], s[kept], v[kept])


class OutputMoments:
    """The covariance of the layer's narrower side, y - b or x: enough for the variance of every coordinate of Uᵀ (y - b)."""

    def __init__(self, site: Site) -> None:
        self.of_output = _from_output(site)
        width = site.d_out if self.of_output else site.d_in
        self.rows, self.origin = 0, torch.zeros(width)
        self.sum, self.products = torch.zeros(width), torch.zeros(width, width)

    def update(self, x: Tensor, y: Tensor) -> None:
        rows = (y if self.of_output else x).float().cpu()
        if self.rows == 0 and len(rows):
            self.origin = rows.mean(0)  # a large mean would drown the variances in rounding
        rows = rows - self.origin
        self.rows += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    def result(self) -> dict[str, Tensor]:
        mean = self.sum / self.rows
        return {"covariance": self.products / self.rows - torch.outer(mean, mean), "rows": torch.tensor(self.rows)}


def _from_output(site: Site) -> bool:
    """Whether Δ is computed from y, which takes 2 r d_out MACs instead of r (d_in + d_out)."""
    return site.d_out <= site.d_in


def _basis(site: Site, u: Tensor, s: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"U": u, "S": s} if _from_output(site) else {"U": u, "S": s, "V": v}
