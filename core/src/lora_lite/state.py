"""Between an adapter's tensors on the layers and the flat `{"path.tensor": tensor}` of a state dict: strict both ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_lite.errors import AdapterFileError, VariantContractError, bullets
from lora_lite.fileformat import dtype_name
from lora_lite.targets import Placement
from lora_lite.variant import TensorSpec


def spec_dtype(spec: TensorSpec, trainable: torch.dtype, site: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor is stored at attach."""
    return spec.dtype or (trainable if spec.trainable else site)


def place_values(placement: Placement, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A site's start values as they will be stored: own memory, the layer's device, the declared dtypes.

    Raises:
        VariantContractError: the values are not what the variant declared.
    """
    wrong = problems(placement.specs, values, "")
    if wrong:
        raise VariantContractError(
            f"variant {placement.variant.name!r} at {placement.spot.path} does not give what it declares:{bullets(wrong)}"
        )
    device, site_dtype = device_of(placement.module), placement.site.dtype
    return {
        name: values[name].detach().to(device=device, dtype=spec_dtype(spec, dtype, site_dtype), copy=True).contiguous()
        for name, spec in placement.specs.items()
    }


def unpack(
    placements: Sequence[Placement], saved: Mapping[str, Tensor], dtypes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Every site's stored tensors, from a state dict, whose `dtypes` by tensor name are held against it if given.

    Raises:
        AdapterFileError: tensors that are missing, extra, misshapen, mistyped or not finite; all of them are listed.
    """
    sites, others = by_site(saved, [p.spot.path for p in placements])
    wrong = [f"{key}: extra (no such site)" for key in others]
    for key, tensor in saved.items():
        expected = dtypes.get(key.rpartition(".")[2], ()) if dtypes else ()
        if expected and dtype_name(tensor.dtype) not in expected:
            wrong.append(f"{key}: dtype {tensor.dtype}, expected {' or '.join(expected)}")
    values = {}
    for placement in placements:
        path = placement.spot.path
        values[path], complaints = _unpack_site(placement, sites[path])
        wrong += complaints
    if wrong:
        raise AdapterFileError(f"{len(wrong)} tensors do not fit; nothing was changed:{bullets(wrong)}")
    return values


def by_site(saved: Mapping[str, Tensor], paths: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A state dict's tensors by site and name, for each of `paths`, and those that belong to none of them."""
    sites: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    others = {}
    for key, tensor in saved.items():
        path, _, name = key.rpartition(".")
        if path in sites:
            sites[path][name] = tensor
        else:
            others[key] = tensor
    return sites, others


def _unpack_site(placement: Placement, saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    prefix = f"{placement.spot.path}."
    try:
        values = placement.variant.load_state_dict(placement.site, saved)
        again = placement.variant.state_dict(placement.site, values)
    except Exception as error:  # a variant's own code, on a file of any content
        return {}, [f"{prefix}*: {placement.variant.name} cannot read {sorted(saved)}: {type(error).__name__}: {error}"]
    complaints = problems(placement.specs, values, prefix)
    complaints += [f"{prefix}{name}: extra" for name in saved.keys() - again.keys() - values.keys()]
    return values, complaints


def problems(specs: Mapping[str, TensorSpec], values: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Where `values` differ from what `specs` declare, a line each."""
    found = [f"{prefix}{name}: missing, expected {list(specs[name].shape)}" for name in specs if name not in values]
    for name, value in values.items():
        if name not in specs:
            found.append(f"{prefix}{name}: extra, not declared (declared: {', '.join(specs)})")
        elif tuple(value.shape) != specs[name].shape:
            found.append(f"{prefix}{name}: shape {list(value.shape)}, expected {list(specs[name].shape)}")
        elif value.is_floating_point() != is_float(specs[name]):
            found.append(f"{prefix}{name}: dtype {value.dtype}, expected {specs[name].dtype or 'a floating-point dtype'}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            found.append(f"{prefix}{name}: has values that are not finite")
    return found


def is_float(spec: TensorSpec) -> bool:
    """Whether a spec declares a floating-point tensor."""
    return spec.dtype is None or spec.dtype.is_floating_point


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's own parameters are."""
    return next(_tensors(module)).device


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
