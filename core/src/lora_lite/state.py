"""Between an adapter's tensors on the layers and the flat `{"path.tensor": tensor}` of a state dict: strict both ways."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite.errors import AdapterFileError, VariantContractError, bullets
from lora_lite.targets import Placement
from lora_lite.variant import Tensors, TensorSpec


def place_values(placement: Placement, values: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """A site's start values as they will be stored: the trainable ones in `dtype`, unless their specs say otherwise.

    Raises:
        VariantContractError: the values are not what the variant declared.
    """
    if wrong := problems(placement.specs, values, ""):
        where = f"variant {placement.variant.name!r} at {placement.spot.path}"
        raise VariantContractError(f"{where} does not give what it declares:{bullets(wrong)}")
    dtypes = {
        name: spec.dtype or (dtype if spec.trainable else placement.site.dtype)
        for name, spec in placement.specs.items()
    }
    return own_copies(placement, values, dtypes)


def own_copies(
    placement: Placement, values: Tensors, dtypes: Mapping[str, torch.dtype | None]
) -> dict[str, Tensor]:
    """The declared tensors in memory of their own on the layer's device; a dtype of None keeps the value's."""
    module = placement.module
    device = next(
        t for own in (module.parameters, module.buffers) for t in own(recurse=False)
    ).device
    form: dict[str, Any] = {
        "device": device,
        "copy": True,
        "memory_format": torch.contiguous_format,
    }
    return {name: values[name].detach().to(dtype=dtype, **form) for name, dtype in dtypes.items()}


def unpack(
    placements: Sequence[Placement], saved: Tensors, known: Sequence[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """Every site's stored tensors, from a state dict of which `known` is known to be wrong.

    Raises:
        AdapterFileError: tensors that are missing, extra, misshapen, mistyped or not finite; all of them are listed.
    """
    sites = by_site(saved, [p.spot.path for p in placements])
    wrong = [
        *known,
        *(f"{key}: extra (no such site)" for key in saved if key.rpartition(".")[0] not in sites),
    ]
    values = {}
    for placement in placements:
        path, variant = placement.spot.path, placement.variant
        try:
            values[path] = variant.load_state_dict(placement.site, sites[path])
            used = values[path].keys() | variant.state_dict(placement.site, values[path]).keys()
        except Exception as error:  # a variant's own code, on a file of any content
            wrong.append(
                f"{path}.*: {variant.name} cannot read {sorted(sites[path])}: {type(error).__name__}: {error}"
            )
            continue
        wrong += problems(placement.specs, values[path], f"{path}.")
        wrong += [f"{path}.{name}: extra" for name in sites[path].keys() - used]
    if wrong:
        raise AdapterFileError(
            f"{len(wrong)} tensors do not fit; nothing was changed:{bullets(wrong)}"
        )
    return values


def by_site(saved: Tensors, paths: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """A state dict's tensors by site and name, for each of `paths`."""
    sites: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for key, tensor in saved.items():
        path, _, name = key.rpartition(".")
        sites.get(path, {})[name] = tensor
    return sites


def problems(specs: Mapping[str, TensorSpec], values: Tensors, prefix: str) -> list[str]:
    """Where `values` differ from what `specs` declare, a line each."""
    found = [
        f"{prefix}{name}: missing, expected {list(specs[name].shape)}"
        for name in specs
        if name not in values
    ]
    for name, value in values.items():
        spec, floating = specs.get(name), value.is_floating_point()
        if spec is None:
            found.append(f"{prefix}{name}: extra, not declared (declared: {', '.join(specs)})")
        elif tuple(value.shape) != spec.shape:
            found.append(f"{prefix}{name}: shape {list(value.shape)}, expected {list(spec.shape)}")
        elif floating != (spec.dtype is None or spec.dtype.is_floating_point):
            found.append(
                f"{prefix}{name}: dtype {value.dtype}, expected {spec.dtype or 'a floating-point dtype'}"
            )
        elif floating and not bool(torch.isfinite(value).all()):
            found.append(f"{prefix}{name}: has values that are not finite")
    return found
