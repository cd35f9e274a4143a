"""What happens to an adapter's tensors after a step of the optimizer.

advance     once for all layers of a variant, with the number of the step
project     layer by layer: back into the allowed set
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_lite.author_mistakes import calling
from lora_lite.layers import overwrite, whole
from lora_lite.site import Site
from lora_lite.variant import Variant, overrides

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter

Stored = dict[str, nn.Parameter]


@torch.no_grad()
def project(adapter: Adapter) -> None:
    """Call `Variant.project` for every layer of an adapter."""
    for attachment, site, t in adapter._each():
        values = {name: whole(tensor) for name, tensor in t.items()}
        with calling(attachment.variant, "project", site.path):
            attachment.methods.project(site, values)
        _write_back(t, values)


@torch.no_grad()
def advance(adapter: Adapter) -> None:
    """Count the step, and call `Variant.advance` for the layers of each variant that has it."""
    classes = {type(each.variant) for each in adapter._state.attachments.values()}
    if not any(overrides(cls, "advance") for cls in classes):
        return  # of nearly all methods, after every step
    sites: dict[Variant, dict[str, Site]] = {}
    stored: dict[Variant, dict[str, Stored]] = {}
    clocks: set[nn.Parameter] = set()
    for attachment, site, t in adapter._each():
        if overrides(type(attachment.variant), "advance"):
            sites.setdefault(attachment.variant, {})[site.path] = site
            stored.setdefault(attachment.variant, {})[site.path] = t
            clocks.add(t["step"])
    for clock in clocks:
        overwrite(clock, whole(clock) + 1)
    for variant, its_sites in sites.items():
        values = {path: _with_gradients(t) for path, t in stored[variant].items()}
        step = int(next(iter(values.values()))["step"])
        with calling(variant, "advance"):
            variant.advance(its_sites, values, step)
        for path, t in stored[variant].items():
            _write_back(t, values[path])


def _with_gradients(t: Stored) -> dict[str, Tensor]:
    """The tensors, whole, and so their gradients."""
    values: dict[str, Tensor] = {}
    for name, tensor in t.items():
        values[name] = whole(tensor)
        if values[name] is not tensor and tensor.grad is not None:  # it is sharded
            values[name].grad = whole(tensor.grad)
    return values


def _write_back(t: Stored, values: Mapping[str, Tensor]) -> None:
    """Copy what was gathered of sharded tensors to where it came from."""
    for name, tensor in t.items():
        if values[name] is not tensor:
            overwrite(tensor, values[name])
