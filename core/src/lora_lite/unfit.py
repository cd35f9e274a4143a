"""Models and layers that cannot carry an adapter: refused before anything is changed."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_lite.attachment import attribute_of
from lora_lite.errors import AdapterError
from lora_lite.layers import is_dtensor
from lora_lite.magnitudes import largest_magnitudes
from lora_lite.placements import Placement
from lora_lite.registry import adapted_root, registry_of
from lora_lite.tensor_spec import TensorSpec

# --- the model


def refuse_unfit(root: nn.Module, placements: Sequence[Placement], name: str) -> list[str]:
    """An error for everything about the model and the chosen layers that forbids to attach.

    Returns:
        The paths of the layers whose weight is 0 everywhere: allowed, but worth a warning.

    Raises:
        AdapterError: a used name, another root, a base on the meta device or offloaded, weights
            that are empty, complex or not finite, an attribute in the way.
    """
    _refuse_other_root(root)
    refuse_taken_name(root, name)
    weights: dict[str, Tensor] = {}
    for placement in placements:
        _refuse_absent(placement)
        _refuse_taken(root, placement, name)
        weight = placement.layer.kind.stored_weight(placement.module)
        if weight is not None and not is_dtensor(weight):
            _refuse_empty(placement.path, weight)
            weights[placement.path] = weight
    largest = largest_magnitudes(weights)
    _refuse_not_finite([path for path, size in largest.items() if not math.isfinite(size)])
    return [path for path, size in largest.items() if size == 0]


def _refuse_other_root(root: nn.Module) -> None:
    found = adapted_root(root)
    if found is not root:
        raise AdapterError(
            f"adapters were attached through a part of this model ({type(found).__name__})",
            fix="Attach this one there too, or detach those first",
        )


def refuse_taken_name(root: nn.Module, name: str) -> None:
    """An error if the model has an adapter of this name."""
    registry = registry_of(root)
    if registry is not None and name in registry.adapters:
        raise AdapterError(
            f"an adapter named {name!r} is attached already",
            expected=f"In use: {', '.join(sorted(registry.adapters))}",
            fix="Detach it, or give another name=",
            adapter=name,
        )


# --- the layers


def _refuse_absent(placement: Placement) -> None:
    """A layer whose weights are not there."""
    module, path = placement.module, placement.path
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(parameter.device.type == "meta" for parameter in parameters):
        raise AdapterError(
            f"{path} is on the meta device (offloaded, or not loaded yet)",
            expected="An adapter there would silently do nothing",
            fix="Load the weights onto a real device first; plan() works on meta",
            layer=path,
        )
    if getattr(module.__dict__.get("_hf_hook"), "offload", False):
        raise AdapterError(
            f"{path} is offloaded by accelerate",
            fix="Load the model without offloading this layer",
            layer=path,
        )


def _refuse_taken(root: nn.Module, placement: Placement, name: str) -> None:
    """A layer, or the root, that has an attribute where a tensor of the adapter would go."""
    for tensor, spec in placement.specs.items():
        module = root if spec.shared else placement.module
        key = attribute_of(name, placement.layer, placement.variant, tensor, spec)
        if key in module._parameters or key in module._buffers or key in module.__dict__:
            owner = "the model" if spec.shared else placement.path
            raise AdapterError(
                f"{owner} has an attribute {key!r} already",
                fix="Give the adapter another name=",
                layer=placement.path,
            )


def _refuse_empty(path: str, weight: Tensor) -> None:
    """A layer whose weight has no numbers, or complex ones."""
    if weight.numel() == 0:
        raise AdapterError(
            f"the weight of {path} is empty",
            expected="ZeRO-3 leaves such weights when it has sharded a model",
            fix="Attach before the model is sharded",
            layer=path,
        )
    if weight.is_complex():
        raise AdapterError(
            f"the weight of {path} is complex ({weight.dtype})",
            fix="Leave the layer out with exclude=",
            layer=path,
        )


def _refuse_not_finite(paths: Sequence[str]) -> None:
    if paths:
        raise AdapterError(
            f"the weights of {len(paths)} layers have values that are not finite",
            details=paths,
            fix="Load the base again; check how it was converted",
            layer=paths[0],
        )


# --- the adapter's own tensors


def refuse_shards(
    name: str, path: str, specs: Mapping[str, TensorSpec], stored: Mapping[str, Tensor]
) -> None:
    """An error if a layer holds only a part of its tensors, as under FSDP1 and ZeRO-3."""
    for tensor, spec in specs.items():
        if tuple(stored[tensor].shape) != spec.shape:
            raise AdapterError(
                f"{path} holds only a shard of {tensor!r}: shape {list(stored[tensor].shape)} "
                f"instead of {list(spec.shape)}",
                expected="FSDP1 (FullyShardedDataParallel) and ZeRO-3 leave such shards",
                fix="Under FSDP1, call this inside FSDP.summon_full_params(model); instead of "
                "ZeRO-3, use FSDP2 (fully_shard), which needs nothing",
                adapter=name,
                layer=path,
            )
