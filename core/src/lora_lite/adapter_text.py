"""An `Adapter` as text: what it is, where it is, what it trains and what it costs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from lora_lite.find import numbers_in
from lora_lite.site import LayerSpec

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter


def adapter_text(adapter: Adapter) -> str:
    """The lines that `repr(adapter)` shows."""
    state = adapter._state
    if not state.attachments:
        return f"Adapter({adapter.name!r}: {state.recipe}, detached)"
    attached = state.attachments.items()
    adapted = sum(_numbers(each.layer, adapter._modules[path]) for path, each in attached)
    share = 100 * adapted / max(1, numbers_in(adapter._root))
    frozen = sum(tensor.numel() for _, spec, tensor in adapter._tensors() if not spec.trainable)
    switched = "" if state.is_active else ", disabled"
    return (
        f"Adapter({adapter.name!r}: {state.recipe}, scale {adapter.scale:g}{switched}\n"
        f"  sites       {layer_counts(adapter)}, {share:.3g} % of the weights\n"
        f"  parameters  {adapter.num_parameters:,} trainable, {frozen:,} frozen\n"
        f"  MACs        {adapter.macs_per_token:,} a token, "
        f"{adapter.macs_per_forward:,} a forward)"
    )


def layer_counts(adapter: Adapter) -> str:
    """How many layers it is on, and of which names: `4 (q_proj x 2, v_proj x 2)`."""
    names = Counter(path.rpartition(".")[2] for path in adapter.sites)
    counts = ", ".join(f"{name} x {count}" for name, count in names.items())
    return f"{len(adapter.sites)} ({counts})"


def _numbers(layer: LayerSpec, module: nn.Module) -> int:
    """How many numbers the weight of a layer holds, were it dense."""
    return layer.kind.count(module) * layer.d_in * layer.d_out
