"""Reading `Linear8bitLt`.

    W = codes · scales / 127

One int8 code for each weight, one float32 scale for each row. A layer made with
`has_fp16_weights=True` keeps a dense W, which it quantises afresh for every product: that W is read
as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lora_lite import LayerKindError
from torch import Tensor


def refuse_unfit(layer: Any) -> None:
    """Raises `LayerKindError` for a layer that its first forward would quantise."""
    if not layer.state.has_fp16_weights and layer.weight.dtype != torch.int8:
        raise LayerKindError(
            f"{layer} is not quantised yet: its weight is still {layer.weight.dtype}, and its "
            "first forward would change it",
            expected="bitsandbytes quantises a layer when it is moved to its device",
            fix="Call model.to(device) first ('cpu' is a device too)",
        )


def blocks(layer: Any, size: int) -> Iterator[Tensor]:
    """The rows of W from first to last, in float32, about `size` weights at a time."""
    parts = torch.split(layer.weight.data, max(1, size // layer.in_features))
    if layer.state.has_fp16_weights:
        yield from (part.float() for part in parts)
        return
    on_weight = getattr(layer.weight, "SCB", None)  # until the first forward
    scales = layer.state.SCB if on_weight is None else on_weight
    for part, scale in zip(parts, torch.split(scales, len(parts[0])), strict=True):
        yield part.float() * (scale[:, None] / 127)
