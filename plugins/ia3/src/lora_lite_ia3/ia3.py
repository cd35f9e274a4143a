"""IA3 and IA3-FF: learned gates on keys and values, and on hidden activations of the feed-forward.

    y' = l ⊙ y,   Δy = e ⊙ y        e (d_out,)        ia3: keys and values; the bias is gated too
    x' = l ⊙ x,   Δx = e ⊙ x        e (d_in,)         ia3_ff: the input of the second projection

The offset e = l - 1 is stored instead of the gate l: it keeps small updates in any number format,
and weight decay pulls the gate to 1.

Start: e = 0, so Δ is bitwise 0, and e has a gradient. On a weight of zeros it has none, ever, as a
gate on 0 is 0; but for `ia3` on a layer with a bias.

The paper uses both together: attach one under each name.

    ll.attach(model, "ia3", name="attention")
    ll.attach(model, "ia3_ff", name="feed_forward")

Liu et al. 2022, (IA)³, arXiv:2205.05638.
"""

from typing import ClassVar

import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
from torch import Tensor

# Llama, Qwen, Gemma; OPT, BART, Whisper, Phi; Mixtral; BLOOM, GPT-NeoX, Falcon; GPT-J; DistilBERT;
# GPT-2, StarCoder2; T5; BERT, RoBERTa, ViT.
SECOND_PROJECTIONS = (
    r"(^|\.)(down_proj|fc2|w2|dense_4h_to_h|fc_out|lin2|mlp\.c_proj|DenseReluDense\.wo"
    r"|\d+\.output\.dense)$"
)


class IA3(Variant, name="ia3"):
    """A gate on every output of a layer, by default of the key and value projections.

    It has no fields.
    """

    recommended_lr: ClassVar[float] = 1e-2
    acts_on_bias: ClassVar[bool] = True
    # Llama, Qwen, Gemma, OPT, BART, Whisper; BERT, RoBERTa, ViT; DistilBERT; T5. A fused projection
    # holds the queries as well, which the paper does not gate: name it in targets= to gate them
    # all.
    default_targets: ClassVar[tuple[str, ...]] = (
        r"(^|\.)(k_proj|v_proj|key|value|k_lin|v_lin|k|v)$",
    )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"e": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"e": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["e"] * y


class IA3FF(Variant, name="ia3_ff"):
    """A gate on every input of a layer, by default of the second feed-forward projection.

    It has no fields.
    """

    recommended_lr: ClassVar[float] = 1e-2
    default_targets: ClassVar[tuple[str, ...]] = (SECOND_PROJECTIONS,)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"e": TensorSpec((site.d_in,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"e": torch.zeros(site.d_in)}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        return t["e"] * x
