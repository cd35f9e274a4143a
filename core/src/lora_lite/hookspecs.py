"""What a plugin may provide, as pluggy sees it.

Authors write none of the hooks: an entry point's object is a `Variant`, `LayerKind` or `Format`
class, whose base carries the implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from lora_lite.formats import Format
    from lora_lite.layers import LayerKind
    from lora_lite.variant import Variant

hookspec = pluggy.HookspecMarker("lora_lite")
hookimpl = pluggy.HookimplMarker("lora_lite")


@hookspec(firstresult=True)
def lora_lite_variant(name: str) -> type[Variant] | None:
    """The variant class that goes by `name`, or None. Entry-point group `lora_lite.variants`."""


@hookspec(firstresult=True)
def lora_lite_layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind that can read `module` as a linear layer, or None. Entry-point group
    `lora_lite.layers`.
    """


@hookspec(firstresult=True)
def lora_lite_format(name: str) -> Format | None:
    """The format that goes by `name`, or None. Entry-point group `lora_lite.formats`."""
