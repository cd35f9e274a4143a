"""What the AntiPaSTO family shares: r frozen singular directions of a weight, and the way through them.

    W M = U diag(S) Q              frozen: the top r singular triplets of the weight, oriented by M (d_in, d_in)
    z = Uᵀ W x = Uᵀ (y - b)        the output's coordinates in the basis U (d_out, r);   z = S ⊙ P x  with  P = Q M⁻¹ (r, d_in)
    W' = U (diag(S) + K) P + W_res,   W_res = W - U diag(S) P = (I - U Uᵀ) W        K (r, r): a variant's core

None of P, M⁻¹, W_res and W' is ever built: since Uᵀ W = diag(S) P for every M, U and S alone describe the basis, and

    Δy = U L z,       L = K diag(1/S)

z is computed from y where d_out ≤ d_in: 2 r d_out multiply-accumulates a token with the way back, and nothing kept but U and S.
Else from x, by Z = Uᵀ W (r, d_in): r (d_in + d_out). Both are the same model. Directions with S below 1e-6 S₁ are left alone.

    basis         M                   found from averages over calibration rows x, each first divided by √(E‖x‖² / d_in)
    plain         I                   W alone
    asvd          diag(E|x_j|)^½      W M
    rms           diag(E x_j²)^½      W M
    corda         C = E[x xᵀ]         W C = E[(y - b) xᵀ]
    corda_sqrt    C^½                 W C^½, whose U and S are those of E[(y - b) (y - b)ᵀ]^½: the principal directions of y - b

Nothing is inverted, so no average is damped. Dividing x first keeps S in the range of the plain one.

ASVD: Yuan et al. 2023, arXiv:2312.05821. CorDA: Yang et al. 2024, arXiv:2406.05223. Directions by activation: after Sun et al.
2023 (Wanda), arXiv:2306.11695.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lora_lite import (
    CalibrationError,
    Observer,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
    top_r_svd,
)
from pydantic import PositiveInt
from torch import Tensor

Basis = Literal["plain", "asvd", "rms", "corda", "corda_sqrt"]
Select = Literal["top", "activation"]

# Singular values below this share of the largest are rounding.
NEGLIGIBLE = 1e-6
# Calibration rows that are converted to float64 at a time.
BLOCK = 1024

# The averages over calibration rows that a choice needs. y is without its bias, n the narrower of x and y.
NEEDED: dict[str, tuple[str, ...]] = {
    "plain": (),
    "asvd": ("x²", "|x|"),
    "rms": ("x²",),
    "corda": ("x²", "y xᵀ"),
    "corda_sqrt": ("x²", "n nᵀ"),
    "activation": ("n", "n nᵀ"),
}


class SingularBasis(Variant):
    """A variant on frozen singular directions. It adds what trains: `core_tensors`, and `core_start` where that is not 0.

    Attributes:
        r: how many singular directions, at most min(d_in, d_out).
        basis: what orients the decomposition; all but "plain" need calibration data (`attach(..., calibration=...)`).
        svd: how the largest singular values are found; see `lora_lite.top_r_svd`.
    """

    takes_scale: ClassVar[bool] = True

    r: PositiveInt = 256
    basis: Basis = "plain"
    svd: Literal["randomized", "exact"] = "randomized"

    def core_tensors(self) -> dict[str, TensorSpec]:
        """What trains. Raises `SiteError` where the fields do not fit each other."""
        raise NotImplementedError

    def core_start(self, rng: Rng) -> dict[str, Tensor]:
        """Its start values."""
        return {name: torch.zeros(spec.shape) for name, spec in self.core_tensors().items()}

    @property
    def by_activation(self) -> bool:
        """Whether the directions are those in which the output varies most, not those of largest S."""
        return False

    def from_output(self, site: Site) -> bool:
        """Whether z is computed from y."""
        return output_is_narrower(site)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        derived = not self._calibrated
        precise = torch.promote_types(site.dtype, torch.float32)
        frozen = {
            "U": TensorSpec((site.d_out, self.r), trainable=False, derived=derived),
            "S": TensorSpec(
                (self.r,), trainable=False, derived=derived, dtype=precise, compute="float32"
            ),
        }
        if not self.from_output(site):
            frozen["Z"] = TensorSpec((self.r, site.d_in), trainable=False, derived=derived)
        return {**frozen, **self.core_tensors()}

    def derive(self, site: Site) -> dict[str, Tensor]:
        return {} if self._calibrated else self._frozen(site, {})

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {
            **self.core_start(rng),
            **(self._frozen(site, statistics) if self._calibrated else {}),
        }

    def observe(self, site: Site) -> Observer | None:
        names = [*NEEDED[self.basis], *(NEEDED["activation"] if self.by_activation else ())]
        return Averages(site, names) if self._calibrated else None

    @property
    def _calibrated(self) -> bool:
        return self.basis != "plain" or self.by_activation

    def _frozen(self, site: Site, mean: Tensors) -> dict[str, Tensor]:
        """U, S and, where z is computed from x, Z."""
        if self._calibrated:
            self._check_enough(site, mean)
        w = site.weight()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        matrix = oriented(w, self.basis, output_is_narrower(site), mean)
        if self.by_activation:
            u, s, _ = top_r_svd(matrix, min(site.d_in, site.d_out), "exact")
            kept = (
                output_variance(u, w, output_is_narrower(site), mean)
                .topk(self.r)
                .indices.sort()
                .values
            )
            u, s = u[:, kept], s[kept]
        else:
            u, s, _ = top_r_svd(matrix, self.r, self.svd)
        if self.basis != "plain":
            self._check_spanned(site, s, mean)
        return {"U": u, "S": s} if self.from_output(site) else {"U": u, "S": s, "Z": u.T @ w}

    def _check_enough(self, site: Site, mean: Tensors) -> None:
        rows = int(mean["rows"])
        if rows < self.r:
            raise CalibrationError(
                f"{site.path}: {self._chooser} chooses r={self.r} directions and saw {rows} calibration tokens; give at least "
                "as many tokens as directions"
            )
        if not all(bool(average.isfinite().all()) for average in mean.values()):
            raise CalibrationError(
                f"{site.path}: {self._chooser} averages the layer's inputs and outputs over calibration data, and they are not "
                "all finite"
            )

    def _check_spanned(self, site: Site, s: Tensor, mean: Tensors) -> None:
        spanned = int((s > NEGLIGIBLE * s[0]).sum())
        if spanned < self.r:
            raise CalibrationError(
                f"{site.path}: {self._chooser} chooses r={self.r} directions, and the layer's outputs on {int(mean['rows'])} "
                f"calibration tokens span only {spanned}; give other tokens, or a smaller r"
            )

    @property
    def _chooser(self) -> str:
        return (
            "select='activation'"
            if self.by_activation and self.basis == "plain"
            else f"basis={self.basis!r}"
        )


class SingularCore(SingularBasis):
    """A variant with Δy = U L z. It adds what `L` is, and how it acts on z."""

    def core(self, t: Tensors, scale: float) -> dict[str, Tensor]:
        """What `through` needs of L, computed once a forward; 0 at scale 0."""
        raise NotImplementedError

    def through(self, t: Tensors, z: Tensor) -> Tensor:
        """L z, for z of shape (..., r)."""
        raise NotImplementedError

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        prepared = self.core(t, scale)
        if site.has_bias and self.from_output(site):
            prepared["b U"] = site.bias().to(t["U"].dtype) @ t["U"]
        return prepared

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        if not self.from_output(site):
            z = x @ t["Z"].T
        elif site.has_bias:
            z = y @ t["U"] - t["b U"]
        else:
            z = y @ t["U"]
        return self.through(t, z) @ t["U"].T

    def macs_per_token(self, site: Site) -> int:
        return (
            2 * self.r * site.d_out if self.from_output(site) else self.r * (site.d_in + site.d_out)
        )

    def macs_per_forward(self, site: Site) -> int:
        return self.r * site.d_out if site.has_bias and self.from_output(site) else 0


class SelectingCore(SingularCore):
    """One that may choose its directions by what passes through the layer. Of `SingularBasis`: r, basis, svd.

    Attributes:
        select: which directions: "top" has the largest singular values; "activation" those whose coordinate of the output
            varies most over calibration data (`attach(..., calibration=...)`).
    """

    select: Select = "top"

    @property
    def by_activation(self) -> bool:
        return self.select == "activation"


class Averages:
    """Averages over all calibration rows: sums in float64 on the CPU, of fixed size whatever the number of rows."""

    def __init__(self, site: Site, names: Sequence[str]) -> None:
        self.output_is_narrower = output_is_narrower(site)
        self.bias = (
            site.bias().cpu().double() if site.has_bias else torch.zeros(1, dtype=torch.float64)
        )
        self.rows = 0
        self.sums = {name: torch.zeros(1, dtype=torch.float64) for name in names}

    def update(self, x: Tensor, y: Tensor) -> None:
        for x_rows, y_rows in zip(torch.split(x, BLOCK), torch.split(y, BLOCK), strict=True):
            self._add(x_rows.cpu().double(), y_rows.cpu().double() - self.bias)

    def result(self) -> dict[str, Tensor]:
        return {
            "rows": torch.tensor(self.rows),
            **{name: total / self.rows for name, total in self.sums.items()},
        }

    def _add(self, x: Tensor, y: Tensor) -> None:
        self.rows += len(x)
        for name in self.sums:
            self.sums[name] = self.sums[name] + self._sum(name, x, y)

    def _sum(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        n = y if self.output_is_narrower else x
        match name:
            case "|x|":
                return x.abs().sum(0)
            case "x²":
                return x.square().sum(0)
            case "y xᵀ":
                return y.T @ x
            case "n":
                return n.sum(0)
            case _:
                return n.T @ n


def output_is_narrower(site: Site) -> bool:
    """Whether y has no more entries than x: the side that is cheaper to compute from, and to average."""
    return site.d_out <= site.d_in


def oriented(w: Tensor, basis: Basis, of_output: bool, mean: Tensors) -> Tensor:
    """W M, or a matrix with the same left singular vectors and singular values. Shape (d_out, d_in) or (d_out, d_out).

    Args:
        w: W, in at least float32.
        basis: which M.
        of_output: whether "n nᵀ" among the averages is that of y - b, not of x.
        mean: the averages of `NEEDED[basis]`.
    """
    if basis == "plain":
        return w
    size = mean["x²"].mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    if basis == "asvd":
        return w * (mean["|x|"] / size).sqrt().to(w)
    if basis == "rms":
        return w * (mean["x²"].sqrt() / size).to(w)
    if basis == "corda":
        return (mean["y xᵀ"] / size / size).to(w)
    eigenvalues, vectors = torch.linalg.eigh(mean["n nᵀ"])
    root: Tensor = ((vectors * eigenvalues.clamp_min(0).sqrt() / size) @ vectors.T).to(w)
    return root if of_output else w @ root


def output_variance(u: Tensor, w: Tensor, of_output: bool, mean: Tensors) -> Tensor:
    """The variance over calibration data of every coordinate of Uᵀ (y - b) = Uᵀ W x."""
    covariance = (mean["n nᵀ"] - torch.outer(mean["n"], mean["n"])).to(u)
    coordinates = u.T if of_output else u.T @ w
    return ((coordinates @ covariance) * coordinates).sum(1)


def inverse(s: Tensor) -> Tensor:
    """1 / S, 0 for the directions that are left alone."""
    return torch.where(s > NEGLIGIBLE * s[0], s.reciprocal(), 0)
