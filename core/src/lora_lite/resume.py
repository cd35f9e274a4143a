"""What a state dict of the whole model says of its adapters, checked when it is loaded.

The tensors of an adapter do not tell what they are for: a LoRA of alpha 64 fits one of alpha 16,
and under another name it is passed over. So the first layer of each adapter keeps a marker, a small
frozen tensor that goes wherever the others go (checkpoints, copies, sharding, half precision). It
is a digest of the variant and the fields of every layer, as whole numbers below 256.
"""

import hashlib
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.attachment import AdapterState, attribute
from lora_lite.author_mistakes import RESERVED
from lora_lite.errors import AdapterError
from lora_lite.layers import whole
from lora_lite.warn import warn

BYTES = 16


def marker(state: AdapterState) -> Tensor:
    """The digest of an adapter's variants and fields, layer by layer."""
    digest = hashlib.sha256()
    texts: dict[Any, str] = {}
    for path, attachment in state.attachments.items():
        variant = attachment.variant
        if variant not in texts:
            texts[variant] = f"{variant.name} {variant.format} {variant.model_dump_json()}"
        digest.update(f"{path}\n{texts[variant]}\n".encode())
    return torch.tensor(list(digest.digest()[:BYTES]), dtype=torch.float32)


def add_marker(module: nn.Module, state: AdapterState) -> None:
    """Put the marker on the first layer of an adapter."""
    device = next(module.parameters()).device
    value = nn.Parameter(marker(state).to(device), requires_grad=False)
    module.register_parameter(attribute(state.name, RESERVED), value)


def remove_marker(module: nn.Module, state: AdapterState) -> None:
    """Take it away again."""
    module._parameters.pop(attribute(state.name, RESERVED), None)


def refuse_other_state(
    adapters: Mapping[str, AdapterState], state_dict: Mapping[str, Any], prefix: str
) -> None:
    """An error if a state dict holds adapters, and not those of this model.

    Raises:
        AdapterError: other names, other layers, or other variants and fields.
    """
    found = _markers(state_dict, prefix)
    if not found:
        return  # the base alone
    for name, value in found.items():
        if name not in adapters:
            raise AdapterError(
                f"the state dict holds an adapter {name!r}, and the model has "
                f"{', '.join(map(repr, adapters))}",
                fix="Attach the adapter under the name that it was saved with",
                adapter=name,
            )
        if not torch.equal(whole(value).float().cpu(), marker(adapters[name])):
            raise AdapterError(
                f"the state dict holds another adapter {name!r} than the model",
                expected="Variant, hyperparameters and layers must be those it was saved with; "
                f"the model has {_described(adapters[name])}",
                fix="Attach the adapter as it was attached before saving",
                adapter=name,
            )
    missing = [name for name in adapters if name not in found]
    if missing:
        raise AdapterError(
            f"the state dict holds the adapters {', '.join(map(repr, found))}, and nothing for "
            f"{', '.join(map(repr, missing))}",
            fix="Detach these first, or load the adapters one by one",
            adapter=missing[0],
        )


def tell_if_saved_whole(adapters: Mapping[str, AdapterState]) -> None:
    """Say what a model saved by `save_pretrained` will be when it is loaded: the base alone.

    Nothing but the caller's name tells that its state dict is taken in order to be saved.
    """
    new = [state for state in adapters.values() if not state.was_told_of_saving]
    if new and _is_called_by("save_pretrained"):
        for state in new:
            state.was_told_of_saving = True
        warn(
            "the model is saved with its adapter on it, and from_pretrained will load the base "
            "alone",
            advice="Save the adapter with adapter.save(path), and load it onto the base with "
            "lora_lite.load(model, path)",
        )


def _is_called_by(function: str) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def _described(state: AdapterState) -> str:
    return f"{state.recipe} on {len(state.attachments)} layers"


def _markers(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The markers in a state dict, by the name of the adapter."""
    start, end = "lora_", f"_{RESERVED}"
    found = {}
    for key, value in state_dict.items():
        if key.endswith(end) and key.startswith(prefix):
            last = key.rpartition(".")[2]
            if last.startswith(start):
                found[last.removeprefix(start).removesuffix(end)] = value
    return found
