"""Between an adapter's tensors on the layers and a flat `{"path.tensor": tensor}`: strict both
ways.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_lite.author_mistakes import checked_tensors
from lora_lite.errors import AdapterFileError, VariantContractError
from lora_lite.layers import whole
from lora_lite.magnitudes import not_finite
from lora_lite.placements import Placement
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import Tensors


def start_values(placement: Placement, values: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's start values as they will be stored.

    Args:
        placement: of the variant on the layer.
        values: what `derive` and `init` gave.
        dtype: of the trainable tensors, unless their specs say otherwise.

    Raises:
        VariantContractError: the values are not what the variant declared.
    """
    wrong = list(problems(placement.specs, values))
    if wrong:
        raise not_as_declared(placement, wrong)
    frozen_dtype = placement.site.dtype
    dtypes = {
        name: spec.dtype or (dtype if spec.trainable else frozen_dtype)
        for name, spec in placement.specs.items()
    }
    return own_copies(placement, values, dtypes)


def not_as_declared(placement: Placement, wrong: Sequence[str]) -> VariantContractError:
    """The error for start values that are not what the variant declared, one line for each."""
    return VariantContractError(
        f"{placement.variant.name!r} at {placement.path} does not give what it declares",
        details=wrong,
        expected="`derive` and `init` together give every tensor that `tensors` declares",
        variant=placement.variant.name,
        layer=placement.path,
    )


def own_copies(
    placement: Placement, values: Tensors, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, Tensor]:
    """The declared tensors in memory of their own, on the layer's device.

    Args:
        placement: of the variant on the layer.
        values: by name.
        dtypes: by name; None keeps the value's.
    """
    device = device_of(placement)
    return {
        name: values[name]
        .detach()
        .to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        for name, dtype in dtypes.items()
    }


def flat(placements: Iterable[Placement], values: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """`{path: {name: tensor}}` as `{"path.name": tensor}`, what layers share once."""
    return {
        placement.key(name): tensor
        for placement in placements
        for name, tensor in values[placement.path].items()
    }


def refuse_overflow(cast: Mapping[str, Tensor]) -> None:
    """An error if values that were finite no longer are, in the dtype to which they were cast.

    Raises:
        AdapterFileError: it names the tensors.
    """
    overflowed = not_finite(cast)
    if overflowed:
        raise AdapterFileError(
            f"{len(overflowed)} tensors have values too large for {cast[overflowed[0]].dtype}",
            details=overflowed,
            fix="Keep a wider dtype, such as float32",
            tensors=overflowed,
        )


def device_of(placement: Placement) -> torch.device:
    """Where the layer is."""
    module = placement.module
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            return tensor.device
    return torch.device("cpu")


def unpack(
    placements: Sequence[Placement], saved: Tensors, known: Sequence[str] = (), *, path: str = ""
) -> dict[str, dict[str, Tensor]]:
    """Every layer's stored tensors, from a state dict.

    Args:
        placements: of the variants on their layers.
        saved: `{"path.tensor": tensor}`.
        known: what is known to be wrong with it already, one line for each tensor.
        path: of the file that it comes from, if any.

    Raises:
        AdapterFileError: tensors that are missing, extra, misshapen, of another dtype or not
            finite; all of them are listed.
    """
    _refuse_no_tensors(saved, path)
    saved = {key: whole(value) for key, value in saved.items()}
    by_path = by_layer(saved, [placement.path for placement in placements])
    shared = {key for placement in placements for key in placement.shared_keys.values()}
    wrong = list(known)
    for key in saved:
        if key.rpartition(".")[0] not in by_path and key not in shared:
            wrong.append(f"{key}: extra (the adapter has no such layer)")
    values: dict[str, dict[str, Tensor]] = {}
    for placement in placements:
        in_common = {
            name: saved[key] for name, key in placement.shared_keys.items() if key in saved
        }
        found, complaints = _unpack_one(placement, {**by_path[placement.path], **in_common})
        values[placement.path] = found
        wrong += complaints
    complete = [placement for placement in placements if values[placement.path]]
    broken = not_finite(flat(complete, values))
    wrong += [f"{key}: has values that are not finite" for key in broken]
    if wrong:
        tensors = tuple(dict.fromkeys(line.partition(":")[0] for line in wrong))
        raise AdapterFileError(
            f"{len(tensors)} tensors do not fit; nothing was changed",
            details=wrong,
            expected="A state dict has every tensor of the adapter and no other",
            path=path,
            tensors=tensors,
        )
    return values


def _refuse_no_tensors(saved: object, path: str) -> None:
    """An error for a state dict that is no mapping from names to tensors."""
    if not isinstance(saved, Mapping):
        raise AdapterFileError(
            f"the state dict is a {type(saved).__name__}",
            expected="It is {name: tensor}, as adapter.state_dict() gives it",
            path=path,
        )
    others = {key: value for key, value in saved.items() if not isinstance(value, Tensor)}
    if others:
        raise AdapterFileError(
            f"{len(others)} values of the state dict are no tensors; nothing was changed",
            details=[f"{key}: {value!r}" for key, value in others.items()],
            path=path,
            tensors=[str(key) for key in others],
        )


def _unpack_one(placement: Placement, saved: Tensors) -> tuple[dict[str, Tensor], list[str]]:
    """The stored tensors of one layer, and what is wrong with them."""
    path, variant = placement.path, placement.variant
    try:
        given = placement.methods.load_state_dict(placement.site, saved)
        values = checked_tensors(variant, "load_state_dict", given, path)
        used = values.keys() | placement.methods.state_dict(placement.site, values).keys()
    except Exception as error:  # a variant's own code, on a file of any content
        reason = f"{type(error).__name__}: {error}"
        return {}, [f"{path}.*: {variant.name} cannot read {sorted(saved)}: {reason}"]
    wrong = [f"{path}.{line}" for line in problems(placement.specs, values)]
    wrong += [f"{path}.{name}: extra" for name in saved.keys() - used]
    return values, wrong


def by_layer(saved: Tensors, paths: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """A state dict's tensors by layer and name, for each of `paths`."""
    layers: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for key, tensor in saved.items():
        path, _, name = key.rpartition(".")
        if path in layers:
            layers[path][name] = tensor
    return layers


def problems(specs: Mapping[str, TensorSpec], values: Tensors) -> Iterable[str]:
    """Where `values` are not what `specs` declare, one line for each tensor."""
    for name, spec in specs.items():
        if name not in values:
            yield f"{name}: missing, expected {list(spec.shape)}"
    for name, value in values.items():
        if name not in specs:
            yield f"{name}: extra, not declared (declared: {', '.join(specs)})"
            continue
        problem = _problem(specs[name], value)
        if problem:
            yield f"{name}: {problem}"


def _problem(spec: TensorSpec, value: object) -> str:
    """What is wrong with one value, or ""."""
    if not isinstance(value, Tensor):
        return f"{value!r} is not a tensor"
    if value.is_meta:
        return "is on the meta device, so it has no values"
    if tuple(value.shape) != spec.shape:
        return f"shape {list(value.shape)}, expected {list(spec.shape)}"
    floating = spec.dtype is None or spec.dtype.is_floating_point
    if value.is_floating_point() != floating:
        return f"dtype {value.dtype}, expected {spec.dtype or 'a floating-point dtype'}"
    return ""
