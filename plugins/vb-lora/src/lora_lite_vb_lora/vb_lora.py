"""VB-LoRA: put A and B together from a bank of vectors that all layers share.

    Δy = B A x
    a part of A or B = Σ softmax(l)_i v_i over the k largest of its logits l        v_i in the bank

The rows of A (r, d_in) and the columns of B (d_out, r) are cut into parts of `length` numbers. Each
part is a mixture of k vectors of the bank (vectors, length), chosen and weighted by its own
logits (vectors,). Trained are the bank, once, and the logits of each layer.

Start: the logits are N(0, 0.01) and the bank is U(-0.02, 0.02), as in the paper. So Δ is small, but
not 0. A weight of zeros changes nothing in this.

Li et al. 2024, arXiv:2405.15179.
"""

from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import linear

LOGITS_DEVIATION = 0.1
BANK_BOUND = 0.02


class VBLoRA(Variant, name="vb_lora"):
    """LoRA whose A and B are mixtures of shared vectors.

    Attributes:
        r: the rank.
        vectors: how many vectors the bank has.
        length: of each of them; it divides d_in and d_out.
        k: of how many vectors a part is mixed.
    """

    recommended_lr: ClassVar[float] = 1e-2

    r: PositiveInt = 4
    vectors: PositiveInt = 256
    length: PositiveInt = 256
    k: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _enough_vectors(self) -> "VBLoRA":
        if self.k > self.vectors:
            raise ValueError(f"k={self.k} vectors cannot be chosen of vectors={self.vectors}")
        return self

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        for side, size in (("d_in", site.d_in), ("d_out", site.d_out)):
            if size % self.length:
                raise SiteError("length", f"it must divide {side} = {size}")
        per_row, per_column = site.d_in // self.length, site.d_out // self.length
        return {
            "bank": TensorSpec((self.vectors, self.length), compute="float32", shared="bank"),
            "logits_A": TensorSpec((self.r, per_row, self.vectors), compute="float32"),
            "logits_B": TensorSpec((per_column, self.r, self.vectors), compute="float32"),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        bank = torch.empty(self.vectors, self.length)
        start = {"bank": bank.uniform_(-BANK_BOUND, BANK_BOUND, generator=rng("bank"))}
        for name in ("logits_A", "logits_B"):
            shape = self.tensors(site)[name].shape
            start[name] = LOGITS_DEVIATION * torch.randn(shape, generator=rng(name))
        return start

    @property
    def identity(self) -> Literal["none"]:
        return "none"

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        a = self.mixed(t["logits_A"], t["bank"])  # (r, parts, length)
        b = self.mixed(t["logits_B"], t["bank"])  # (parts, r, length)
        return {"A": a.flatten(1), "B": b.transpose(1, 2).flatten(0, 1)}

    def mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Each part from its logits: (..., vectors) to (..., length)."""
        largest, chosen = logits.topk(self.k, dim=-1)
        return (largest.softmax(-1).unsqueeze(-1) * bank[chosen]).sum(-2)

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(linear(x, t["A"].to(y.dtype)), t["B"].to(y.dtype))

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)
