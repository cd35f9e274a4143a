"""The frozen part of the AntiPaSTO family: r singular triplets of the weight.

    W M = U diag(S) Q,    V = Q M⁻¹       U (d_out, r), S (r), V (r, d_in)
    W = U diag(S) V + W_res               W_res: the rest, never built

For the plain basis M = I, and U, S, V are the singular value decomposition of W. For the others
calibration data choose M (d_in, d_in), and so orient the decomposition; see calibration.py.

Every method computes Δy = U K (V x) with its own core K (r, r). The output knows V x as well, since
Uᵀ (y - b) = S ⊙ V x; but y is rounded, and in half precision that drowns its small coordinates.
"""

from typing import Any, ClassVar, Literal, NoReturn

import torch
from lora_lite import AdapterFileError
from lora_lite.author import (
    CalibrationError,
    Observer,
    ScaledVariant,
    Site,
    Tensors,
    TensorSpec,
    check_rank,
    top_r_svd,
)
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

from lora_lite_antipasto.calibration import (
    Averages,
    Moments,
    asvd,
    corda,
    corda_sqrt,
    output_variance,
    rms,
)

ORIENTATIONS = {"asvd": asvd, "rms": rms, "corda": corda, "corda_sqrt": corda_sqrt}

# Calibration data do not span a direction whose singular value is below this share of the largest.
NEGLIGIBLE = 1e-6


class SingularVariant(ScaledVariant):
    """The fields that choose the singular directions, and where these come from.

    How they are used is on each method's page.

    Attributes:
        r: how many singular directions, at most min(d_in, d_out).
        basis: what orients the decomposition; all but "plain" need calibration data
            (`attach(..., calibration=...)`).
        svd: how the largest singular values are found; see `lora_lite.author.top_r_svd`.
        select: which directions: "top" has the largest singular values; "activation" those whose
            coordinate of the output varies most over calibration data.
    """

    format: ClassVar[int] = 2

    r: PositiveInt = 256
    basis: Literal["plain", "asvd", "rms", "corda", "corda_sqrt"] = "plain"
    svd: Literal["randomized", "exact"] = "randomized"
    select: Literal["top", "activation"] = "top"

    def frozen(self, site: Site) -> dict[str, TensorSpec]:
        """For `tensors`: U, S and V. Raises `SiteError` where r is larger than the layer allows."""
        check_rank(self.r, site)
        derived = not self.needs_data
        precise = torch.promote_types(site.dtype, torch.float32)
        v = (self.r, site.d_in)
        return {
            "U": TensorSpec((site.d_out, self.r), trainable=False, derived=derived),
            "S": TensorSpec(
                (self.r,), trainable=False, derived=derived, dtype=precise, compute="float32"
            ),
            "V": TensorSpec(v, trainable=False, dtype=precise, compute="float32")
            if self.v_is_in_two_parts
            else TensorSpec(v, trainable=False, derived=derived),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        if self.needs_data:
            return {}
        u, s, v = top_r_svd(site.weight(), self.r, self.svd, layer=site.path)
        return {"U": u, "S": s, "V": v}

    def observe(self, site: Site) -> Observer | None:
        if not self.needs_data:
            return None
        by_activation = self.select == "activation"
        return Moments(
            site, n_n=by_activation or self.basis == "corda_sqrt", y_x=self.basis == "corda"
        )

    def from_data(self, site: Site, statistics: Tensors) -> dict[str, Tensor]:
        """For `init`: U, S and V where calibration data choose them; nothing where `derive` does.

        Raises:
            CalibrationError: the data cannot choose: too few rows, rows that span too little, or
                averages that are not finite.
        """
        if not self.needs_data:
            return {}
        mean = Averages(**statistics)
        chooser = "select='activation'" if self.basis == "plain" else f"basis={self.basis!r}"
        check_enough(mean, self.r, f"{site.path}: {chooser}")
        w = site.weight()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        oriented = w if self.basis == "plain" else ORIENTATIONS[self.basis](w, mean)
        if self.select == "top":
            u, s, v = top_r_svd(oriented, self.r, self.svd, layer=site.path)
        else:
            u, s, v = top_r_svd(oriented, min(w.shape), "exact", layer=site.path)
            kept = output_variance(u, w, mean).topk(self.r).indices.sort().values
            u, s, v = u[:, kept], s[kept], v[kept]
        if self.basis != "plain":
            check_spanned(mean, s, f"{site.path}: {chooser}")
            v = (u.T @ w) / s[:, None]
        return {"U": u, "S": s, "V": v}

    def coordinates(self, t: Tensors, x: Tensor) -> Tensor:
        """The input in singular coordinates, z = V x (..., r)."""
        if not self.v_is_in_two_parts:
            return linear(x, t["V"])
        dtype = t["U"].dtype
        high = t["V"].bfloat16().to(dtype)
        return linear(x, high) + linear(x, (t["V"] - high).to(dtype))

    def macs_of_basis(self, site: Site) -> int:
        """Multiply-accumulates a token of V x and of U."""
        return self.r * ((2 if self.v_is_in_two_parts else 1) * site.d_in + site.d_out)

    @property
    def v_is_in_two_parts(self) -> bool:
        """Whether V is kept in float32, and multiplied in two parts that fit half precision.

        A V that is oriented by correlations of the inputs has large entries, which cancel on such
        inputs; all the more the nearer r is to d_in. Rounded to half precision they would not. It
        is done on every layer, so that the costs are those of the shapes alone.
        """
        return self.basis in ("corda", "corda_sqrt")

    @property
    def needs_data(self) -> bool:
        """Whether calibration data choose the directions, so that the base alone does not."""
        return self.basis != "plain" or self.select == "activation"

    @classmethod
    def upgrade(
        cls, fields: dict[str, Any], tensors: dict[str, Tensor], from_format: int
    ) -> NoReturn:
        """Refuses files of format 1, which have no V: an upgrade has no W to compute it from.

        Raises:
            AdapterFileError: always.
        """
        raise AdapterFileError(
            f"the file holds an adapter of {cls.name!r} in format {from_format}, "
            "without the right singular vectors V",
            expected=f"This version of the method keeps them, in format {cls.format}",
            fix="Attach the method again with the same fields and copy the trained tensors into it "
            "(they mean the same), or load the file with the version that wrote it",
        )


def check_enough(mean: Averages, r: int, chooser: str) -> None:
    """Refuses averages over fewer rows than directions, or averages that are not finite.

    Raises:
        CalibrationError: as above.
    """
    rows = int(mean.rows)
    if rows < r:
        raise CalibrationError(
            f"{chooser} chooses r={r} directions and saw {rows} calibration tokens",
            fix="Give at least as many tokens as directions",
        )
    if not all(bool(average.isfinite().all()) for average in mean):
        raise CalibrationError(
            f"{chooser} averages the layer's inputs and outputs over calibration data, "
            "and they are not all finite"
        )


def check_spanned(mean: Averages, s: Tensor, chooser: str) -> None:
    """Refuses rows that leave some of the r directions without a meaning.

    Raises:
        CalibrationError: as above.
    """
    spanned = int((s > NEGLIGIBLE * s[0]).sum())
    if spanned < len(s):
        raise CalibrationError(
            f"{chooser} chooses r={len(s)} directions, and the layer's outputs on "
            f"{int(mean.rows)} calibration tokens span only {spanned}",
            fix="Give other tokens, or a smaller r",
        )
