"""AntiPaSTO mixing: let frozen singular directions feed one another through a low-rank matrix.

    W  = U diag(S) V + W_res                   frozen: U (d_out, r), S (r), V (r, d_in) and the
    W' = U (diag(S') + c B A) V + W_res        rest, W_res, never built; see basis.py

    A (k, r), B (r, k);   S' = S ⊙ (1 + ELU(c g)),  or S without a gain

    Δy = U (S ⊙ ELU(c g) ⊙ z + c B A z),       z = V x

B A is not scaled by S, so a step of it moves W by its own size, not by that of the largest singular
value.

Start: A uniform in ±1/√r, B = 0, g = 0, so Δ is bitwise 0; B and g have a gradient at once, A from
the second step on. On a weight of zeros g has no gradient, ever: a factor of 0 is 0.

AntiPaSTO: 2026, arXiv:2601.07473. A full r x r matrix in place of B A is LoRA-XS, Bałazy et al.
2024, arXiv:2405.17604.
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, uniform_start
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import elu, linear

from lora_lite_antipasto.basis import SingularVariant


class AntiPaSTOMix(SingularVariant, name="antipasto_mix"):
    """Frozen singular vectors with a learned low-rank mixing of their coordinates.

    Of `SingularVariant`: r, basis, svd, select.

    Attributes:
        k: rank of the mixing, 1 ≤ k ≤ r.
        gain: whether each direction has a bounded gain g as well.
    """

    recommended_lr: ClassVar[float] = 5e-3

    k: PositiveInt = 8
    gain: bool = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        specs = self.frozen(site)
        if self.k > self.r:
            raise SiteError(
                "k",
                f"{self.k} is larger than the rank r={self.r} that it mixes; "
                f"the largest possible is {self.r}",
            )
        specs["A"] = TensorSpec((self.k, self.r))
        specs["B"] = TensorSpec((self.r, self.k))
        if self.gain:
            specs["g"] = TensorSpec((self.r,), compute="float32")
        return specs

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        values = self.from_data(site, statistics)
        values["A"] = uniform_start((self.k, self.r), rng("A"))
        values["B"] = torch.zeros(self.r, self.k)
        if self.gain:
            values["g"] = torch.zeros(self.r)
        return values

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        z = self.coordinates(t, x)
        core = linear(scale * linear(z, t["A"]), t["B"])
        if self.gain:
            core = core + (t["S"] * elu(scale * t["g"])).to(z.dtype) * z
        return linear(core, t["U"])

    def macs_per_token(self, site: Site) -> int:
        return self.macs_of_basis(site) + 2 * self.k * self.r
