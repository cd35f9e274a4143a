"""What an adapter looks like when it is printed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from lora_lite.find import numbers_in
from lora_lite.hooks import AdapterState

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter


def adapter_table(adapter: Adapter, state: AdapterState, root: nn.Module) -> str:
    """Variant and switches, layers, parameters, and costs: a line each."""
    if not state.attachments:
        return f"Adapter({adapter.name!r}: {state.recipe}, detached)"
    names = Counter(path.rpartition(".")[2] for path in adapter.sites)
    counts = ", ".join(f"{name} x {count}" for name, count in names.items())
    adapted = sum(each.layer.d_in * each.layer.d_out for each in state.attachments.values())
    share = 100 * adapted / max(1, numbers_in(root))
    frozen = sum(tensor.numel() for _, spec, tensor in adapter._tensors() if not spec.trainable)
    switched = "" if state.is_active else ", disabled"
    return (
        f"Adapter({adapter.name!r}: {state.recipe}, scale {adapter.scale:g}{switched}\n"
        f"  sites       {len(adapter.sites)} ({counts}), {share:.3g} % of the weights\n"
        f"  parameters  {adapter.num_parameters:,} trainable, {frozen:,} frozen\n"
        f"  MACs        {adapter.macs_per_token:,} a token, "
        f"{adapter.macs_per_forward:,} a forward)"
    )
