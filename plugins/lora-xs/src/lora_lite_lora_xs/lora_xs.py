"""LoRA-XS: train only an r × r matrix between frozen singular factors of the weight.

    Δy = s · B R (A x)        R (r, r)  trained        s = α / r
    A = diag(S) V (r, d_in),  B = U (d_out, r)  frozen

U, S, V are the top-r singular triplets of W.

Start: R = 0, so Δ is bitwise 0, and R has a gradient. On a weight of zeros it has none, ever.

Bałazy et al. 2024, arXiv:2405.17604.
"""

from typing import Any, ClassVar, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import (
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
from torch.nn.functional import linear


class LoRAXS(Variant, name="lora_xs"):
    """A trained r × r core between frozen singular factors, Δy = s · B R (A x).

    Attributes:
        r: how many singular directions, 1 ≤ r ≤ min(d_in, d_out).
        alpha: the scale is alpha / r; None means alpha = r, so scale 1.
        svd: how they are found; see `lora_lite.author.top_r_svd`.
    """

    format: ClassVar[int] = 2
    recommended_lr: ClassVar[float] = 4e-3

    r: PositiveInt = 32
    alpha: PositiveFinite | None = None
    svd: Literal["randomized", "exact"] = "randomized"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {
            "A": TensorSpec((self.r, site.d_in), trainable=False, derived=True),
            "B": TensorSpec((site.d_out, self.r), trainable=False, derived=True),
            "R": TensorSpec((self.r, self.r)),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        u, s, v = top_r_svd(site.weight(), self.r, self.svd, layer=site.path)
        return {"A": s[:, None] * v, "B": u}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"R": torch.zeros(self.r, self.r)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        core = linear(linear(x, t["A"]), t["R"])
        return linear(lora_scale(self.alpha, self.r) * core, t["B"])

    @classmethod
    def upgrade(
        cls, fields: dict[str, Any], tensors: dict[str, Tensor], from_format: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Takes files of format 1 that hold A; those of layers with d_out ≤ d_in do not.

        Raises:
            AdapterFileError: there is no A, and an upgrade has no weight to compute it from.
        """
        if "A" in tensors:
            return fields, tensors
        raise AdapterFileError(
            f"the file holds an adapter of {cls.name!r} in format {from_format}, without the "
            "frozen factor A",
            expected=f"This version of the method keeps it, in format {cls.format}",
            fix="Attach the method again with the same fields and copy R into it, "
            "or load the file with the version that wrote it",
        )

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out) + self.r**2
