"""VeRA: scale the rows of two frozen random matrices that all layers share.

    Δy = b ∘ B (d ∘ A x)

A (r, d_in) and B (d_out, r) are random, frozen, and one for all layers of the same width. Trained
are the vectors d (r,) and b (d_out,) of each layer.

Start: d = `d_initial`, b = 0, so Δ is bitwise 0. At the first step b alone has a gradient. A and B
are uniform as of He et al. (2015), and follow from `projection_seed` and their shapes: a file
without derived tensors leaves them out. A weight of zeros changes nothing in this.

Kopiczko et al. 2023, arXiv:2310.11454.
"""

import math
from typing import ClassVar

import torch
from lora_lite.author import PositiveFinite, Rng, Site, Tensors, TensorSpec, Variant
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.functional import linear


class VeRA(Variant, name="vera"):
    """Two trained vectors a layer around two random matrices, Δy = b ∘ B (d ∘ A x).

    Attributes:
        r: the rank.
        d_initial: what every number of d starts at.
        projection_seed: of the random matrices.
    """

    recommended_lr: ClassVar[float] = 1e-2

    r: PositiveInt = 256
    d_initial: PositiveFinite = 0.1
    projection_seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        a, b = (self.r, site.d_in), (site.d_out, self.r)
        return {
            "A": TensorSpec(a, trainable=False, derived=True, shared="A"),
            "B": TensorSpec(b, trainable=False, derived=True, shared="B"),
            "d": TensorSpec((self.r,)),
            "b": TensorSpec((site.d_out,)),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        return {
            "A": uniform((self.r, site.d_in), self.projection_seed),
            "B": uniform((site.d_out, self.r), self.projection_seed + 1),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"d": torch.full((self.r,), self.d_initial), "b": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["b"] * linear(t["d"] * linear(x, t["A"]), t["B"])

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)


def uniform(shape: tuple[int, int], seed: int) -> Tensor:
    """U(-√(6 / n), √(6 / n)), with n the number of columns."""
    bound = math.sqrt(6 / shape[1])
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
