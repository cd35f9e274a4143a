"""The forward delta: what runs on an adapted layer.

    x' = x + Σ s Δx(x),        y' = (W x' + b) + Σ s Δy(x', W x' + b)

One `LayerHooks` on each layer, whatever the number of adapters, serves one `Attachment` for each of
them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.attachment import AdapterState, Attachment, attribute
from lora_lite.author_mistakes import RESERVED
from lora_lite.layers import layer_input, with_input


class LayerHooks:
    """The two hooks of one layer, and the attachments that they serve.

    These are in the order of the adapters' names, so that the sum of the deltas does not depend on
    the order of attachment.

    Attributes:
        attachments: one for each adapter on the layer.
        was_called: whether the layer was called since the hooks came. Not kept under compile.
    """

    def __init__(self) -> None:
        self.attachments: tuple[Attachment, ...] = ()
        self.was_called = False

    def add(self, attachment: Attachment) -> None:
        """Serve one adapter more."""
        attachments = (*self.attachments, attachment)
        self.attachments = tuple(sorted(attachments, key=lambda each: each.state.name))

    def remove(self, state: AdapterState) -> None:
        """Serve one adapter less."""
        self.attachments = tuple(each for each in self.attachments if each.state is not state)

    def tensor_names(self) -> set[str]:
        """What the adapters' tensors are called on the layer, the marker of `resume` included."""
        markers = {attribute(each.state.name, RESERVED) for each in self.attachments}
        own = (
            {key for name, key in each.keys.items() if name not in each.shared}
            for each in self.attachments
        )
        return markers.union(*own)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: adds the input deltas."""
        if not torch.compiler.is_compiling():
            self.was_called = True
        active = [each for each in self.attachments if each.adds_to_input]
        if not active:
            return None
        x = layer_input(args, kwargs)
        changed = x
        for each in active:
            changed = each.add_to_input(module, x, changed)
        return with_input(changed, args, kwargs)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        """The forward hook: adds the output deltas."""
        changed = y
        for each in self.attachments:
            if each.adds_to_output:
                changed = each.add_to_output(module, args, kwargs, y, changed)
        return changed
