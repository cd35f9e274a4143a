"""The tensors of an attached adapter: out of the layers for a state dict, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_lite.author_mistakes import calling, checked_tensors
from lora_lite.layers import overwrite, whole
from lora_lite.placements import Placement
from lora_lite.shared import tensor_key
from lora_lite.state import flat, refuse_overflow, unpack
from lora_lite.unfit import refuse_shards
from lora_lite.wrapped import reshard

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter


def saved_tensors(adapter: Adapter, derived: bool) -> dict[str, Tensor]:
    """What is saved of an adapter, as `{"path.tensor": tensor}`, detached.

    Args:
        adapter: as it is on the model.
        derived: whether to include the tensors that can be derived from the base again.
    """
    left_out = {} if derived else derived_tensors(adapter)
    state: dict[str, Tensor] = {}
    for attachment, site, t in adapter._each():
        stored = {name: whole(value.detach()) for name, value in t.items()}
        refuse_shards(adapter.name, site.path, attachment.specs, stored)
        with calling(attachment.variant, "state_dict", site.path):
            given = attachment.methods.state_dict(site, stored)
        saved = checked_tensors(attachment.variant, "state_dict", given, site.path)
        for name, value in saved.items():
            spec = attachment.specs.get(name)
            key = tensor_key(site.path, attachment.variant.name, name, spec)
            if key not in left_out:
                state[key] = value
    return state


def derived_tensors(adapter: Adapter) -> dict[str, nn.Parameter]:
    """The tensors that can be derived from the base again, as `{"path.tensor": tensor}`."""
    return {key: parameter for key, spec, parameter in adapter._tensors() if spec.derived}


def overwrite_tensors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy a full state dict into the attached tensors: all of it or nothing."""
    placements = [
        Placement(each.layer, adapter._modules[path], each.variant, each.specs)
        for path, each in adapter._state.attachments.items()
    ]
    values = unpack(placements, tensors)
    reshard(adapter._root)
    for attachment, site, t in adapter._each():
        refuse_shards(adapter.name, site.path, attachment.specs, t)
    targets = {key: target for key, _, target in adapter._tensors()}
    cast = {key: value.to(targets[key].dtype) for key, value in flat(placements, values).items()}
    refuse_overflow(cast)
    with torch.no_grad():
        for key, target in targets.items():
            overwrite(target, cast[key])
