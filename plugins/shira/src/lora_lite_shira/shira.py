"""SHiRA: train a few entries of the weight, chosen at random, and leave all others alone.

    ΔW_k = v_i where k is the i-th chosen entry, 0 elsewhere        n = r (d_in + d_out) entries
    Δy = ΔW x

As many numbers as a LoRA of rank r, and a change of high rank that touches a few percent of the
weight, so that several adapters collide little.

Start: v = 0, so Δ is bitwise 0, and every entry has a gradient at the first step. The places depend
on the seed, the layer and the adapter's name, and are kept in the file. A weight of zeros changes
nothing in this.

Bhardwaj et al. 2024, arXiv:2406.13175 (SHiRA-Rand).
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


class SHiRA(Variant, name="shira"):
    """A sparse change of r (d_in + d_out) random entries.

    Attributes:
        r: as many entries are trained as a LoRA of this rank has numbers.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 8

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        n, entries = self.r * (site.d_in + site.d_out), site.d_in * site.d_out
        if n > entries:
            raise SiteError("r", f"{n} entries are more than the weight's {entries}")
        return {
            "v": TensorSpec((n,), compute="float32"),
            "places": TensorSpec((n,), trainable=False, dtype=torch.int64),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        n = self.r * (site.d_in + site.d_out)
        shuffled = torch.randperm(site.d_in * site.d_out, generator=rng("places"))
        return {"v": torch.zeros(n), "places": shuffled[:n].sort().values}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        flat = t["v"].new_zeros(site.d_out * site.d_in).scatter(0, t["places"], t["v"])
        return {CHANGE: flat.view(site.d_out, site.d_in)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out
