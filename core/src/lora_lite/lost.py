"""Layers that an adapter was attached to and that are no longer what they were.

A model can be changed while it is adapted: its embeddings resized, its blocks cut, its projections
fused. The adapter would silently lose a part.
"""

from collections.abc import Mapping

from torch import nn

from lora_lite.attachment import AdapterState, Attachment
from lora_lite.errors import AdapterError
from lora_lite.modules import layer_modules


def refuse_lost_layers(
    root: nn.Module, state: AdapterState, modules: Mapping[str, nn.Module] | None = None
) -> None:
    """An error if a layer of an adapter was replaced or removed, or has lost its tensors.

    Args:
        root: the model.
        state: of the adapter.
        modules: the layers as they were at attach, by path; None if that is not known.

    Raises:
        AdapterError: it names the layer.
    """
    now = layer_modules(root)
    for path, attachment in state.attachments.items():
        before = modules[path] if modules is not None else now.get(path)
        problem = _problem(now.get(path), before, attachment)
        if problem:
            raise AdapterError(
                f"adapter {state.name!r} is no longer whole: {path} {problem}",
                fix="adapter.detach() still works: detach, change the model, and attach again",
                adapter=state.name,
                layer=path,
            )


def _problem(now: nn.Module | None, before: nn.Module | None, attachment: Attachment) -> str:
    """What is wrong with an adapted layer, as the end of a sentence; "" if nothing is."""
    if now is None:
        return "is not in the model any more"
    if now is not before:
        return "was replaced by another module"
    if not all(hasattr(attachment.holder(now, name), key) for name, key in attachment.keys.items()):
        return "has lost the adapter's tensors"
    return ""
