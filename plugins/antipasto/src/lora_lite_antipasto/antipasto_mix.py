"""AntiPaSTO mixing: let frozen singular directions feed one another through a low-rank matrix, beside a gain on each.

    W' = U (diag(S') + c B A) V + W_res        A (k, r), B (r, k);   S' = S ⊙ (1 + ELU(c g)),  or S without a gain

    Δy = U (ELU(c g) ⊙ z + c B A (z / S)),     z = Uᵀ (y - b) = S ⊙ V x

U (d_out, r), S (r), V (r, d_in) are frozen: r singular triplets of W; see basis.py. B A is not scaled by S, so a step of it
moves W by its own size, not by that of the largest singular value.

Start: A uniform in ±1/√r, B = 0, g = 0, so Δ is bitwise 0; B and g have a gradient at once, A from the second step on.

AntiPaSTO: 2026, arXiv:2601.07473. A full r x r matrix in place of B A is LoRA-XS, Bałazy et al. 2024, arXiv:2405.17604.
"""

import math
from typing import ClassVar

import torch
from lora_lite import Rng, Site, SiteError, Tensors, TensorSpec
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import elu, linear

from lora_lite_antipasto.basis import SingularCore, inverse


class AntiPaSTOMix(SingularCore, name="antipasto_mix"):
    """Frozen singular basis with a learned low-rank mixing of its directions. Of `SingularBasis`: r, basis, svd.

    Attributes:
        k: rank of the mixing, 1 ≤ k ≤ r.
        gain: whether each direction has a bounded gain g as well.
    """

    recommended_lr: ClassVar[float] = 5e-3

    k: PositiveInt = 8
    gain: bool = True

    def core_tensors(self) -> dict[str, TensorSpec]:
        if self.k > self.r:
            raise SiteError(
                "k",
                f"{self.k} is larger than the rank r={self.r} that it mixes; the largest possible is {self.r}",
            )
        mixing = {
            "A": TensorSpec((self.k, self.r), compute="float32"),
            "B": TensorSpec((self.r, self.k), compute="float32"),
        }
        return {**mixing, "g": TensorSpec((self.r,), compute="float32")} if self.gain else mixing

    def core_start(self, rng: Rng) -> dict[str, Tensor]:
        a = torch.empty(self.k, self.r).uniform_(-1, 1, generator=rng("A")) / math.sqrt(self.r)
        return {**super().core_start(rng), "A": a}

    def core(self, t: Tensors, scale: float) -> dict[str, Tensor]:
        mixing = {"A / S": t["A"] * inverse(t["S"]), "c B": scale * t["B"]}
        return {**mixing, "e": elu(scale * t["g"])} if self.gain else mixing

    def through(self, t: Tensors, z: Tensor) -> Tensor:
        mixed = linear(linear(z, t["A / S"].to(z.dtype)), t["c B"].to(z.dtype))
        return t["e"].to(z.dtype) * z + mixed if self.gain else mixed

    def macs_per_token(self, site: Site) -> int:
        return super().macs_per_token(site) + 2 * self.k * self.r
