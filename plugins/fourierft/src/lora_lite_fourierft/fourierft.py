"""FourierFT: train n coefficients of the change's spectrum, at random frequencies.

    ΔW = α · Re IDFT₂(F)        F_k = c_i where k is the i-th chosen frequency, 0 elsewhere
    Δy = ΔW x

c (n,) is real. IDFT₂ is the inverse discrete Fourier transform in two dimensions, which divides by
d_in d_out. ΔW is formed once a forward, in at least float32.

Start: c = 0, so Δ is bitwise 0, and every coefficient has a gradient at the first step. The
frequencies depend on the seed, the layer and the adapter's name, and are kept in the file. A weight
of zeros changes nothing in this.

Gao et al. 2024, arXiv:2405.03003.
"""

from typing import ClassVar

import torch
from lora_lite.author import PositiveFinite, Rng, Site, Tensors, TensorSpec, Variant
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import linear

# What `prepare` computes: ΔW (d_out, d_in).
CHANGE = "change"


class FourierFT(Variant, name="fourierft"):
    """A change from n coefficients of its spectrum, ΔW = α · Re IDFT₂(F).

    Attributes:
        n: how many coefficients a layer has; at most all d_in d_out of them.
        alpha: the scale α.
    """

    recommended_lr: ClassVar[float] = 3e-2

    n: PositiveInt = 1000
    alpha: PositiveFinite = 300.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        n = self.count(site)
        return {
            "c": TensorSpec((n,), compute="float32"),
            "frequencies": TensorSpec((n,), trainable=False, dtype=torch.int64),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        n = self.count(site)
        shuffled = torch.randperm(site.d_in * site.d_out, generator=rng("frequencies"))
        return {"c": torch.zeros(n), "frequencies": shuffled[:n].sort().values}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        flat = t["c"].new_zeros(site.d_out * site.d_in).scatter(0, t["frequencies"], t["c"])
        spectrum = flat.view(site.d_out, site.d_in)
        return {CHANGE: self.alpha * torch.fft.ifft2(spectrum).real}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(x, t[CHANGE].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return site.d_in * site.d_out

    def count(self, site: Site) -> int:
        """How many coefficients this layer has."""
        return min(self.n, site.d_in * site.d_out)
