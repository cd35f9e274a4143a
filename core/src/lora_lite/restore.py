"""From a file back into the adapter that it was saved from, to go on training.

`load` attaches what a file holds. Here an adapter is attached already, an optimizer has its
parameters, and the model may be sharded. So nothing may differ: the variant and the fields of every
layer, the dtypes, the weights of the base. A difference would not stop the training, it would only
make it another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_lite.errors import AdapterFileError, BaseMismatchError
from lora_lite.fileformat import FilePath, read
from lora_lite.fingerprint import changed, probe_agrees
from lora_lite.metadata import Configuration, Metadata
from lora_lite.variant import Tensors, Variant

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter

ANOTHER_WAY = "lora_lite.load(model, path) attaches what the file holds"


def restore(adapter: Adapter, path: FilePath) -> None:
    """Put what was saved to a file into an attached adapter. See `Adapter.restore`."""
    described, tensors = read(path)
    _refuse_other_variants(adapter, path, described)
    attached = adapter.state_dict()
    _refuse_other_dtypes(path, tensors, attached)
    _refuse_other_base(adapter, path, described)
    if not described.derived:
        tensors = {**_derived(adapter, path, described), **tensors}
    with kept_on_error([adapter]):
        adapter.load_state_dict(tensors)
        adapter.scale = described.scale


@contextmanager
def kept_on_error(adapters: Sequence[Adapter], others: Sequence[Tensor] = ()) -> Iterator[None]:
    """Give adapters and other tensors back as they were, if the block fails or is interrupted."""
    own = [tensor for adapter in adapters for _, _, tensor in adapter._tensors()]
    tensors: list[Tensor] = [*own, *others]
    before = [tensor.detach().clone() for tensor in tensors]
    scales = [adapter.scale for adapter in adapters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for adapter, scale in zip(adapters, scales, strict=True):
            adapter.scale = scale
        raise


# --- what must not differ


def _refuse_other_variants(adapter: Adapter, path: FilePath, described: Metadata) -> None:
    sites = adapter.sites
    differences = []
    for layer in dict.fromkeys([*described.sites, *sites]):
        if layer not in sites:
            differences.append(f"{layer}: only in the file")
        elif layer not in described.sites:
            differences.append(f"{layer}: only in the model")
        else:
            difference = _difference(described.of(layer), sites[layer])
            if difference:
                differences.append(f"{layer}: {difference}")
    if differences:
        raise AdapterFileError(
            f"{path} does not hold the state of adapter {adapter.name!r}, but of another one; they "
            f"differ in {len(differences)} layers",
            details=differences,
            expected="Variant, hyperparameters and layers must be those it was saved with",
            fix=f"Attach the adapter as it was attached before saving; or {ANOTHER_WAY}",
            path=str(path),
        )


def _difference(saved: Configuration, attached: Variant) -> str:
    """How the variant in the file differs from the one on the layer, or ""."""
    if saved.variant != attached.name:
        return f"variant {saved.variant!r} in the file, {attached.name!r} in the model"
    if saved.variant_format != attached.format:
        return (
            f"format {saved.variant_format} of {saved.variant!r} in the file, "
            f"{attached.format} installed"
        )
    try:
        variant = type(attached).model_validate_json(saved.fields)
    except (ValueError, RecursionError):
        return f"{saved.fields[:200]} in the file, which {attached.name!r} refuses"
    differences = []
    for field in type(attached).model_fields:
        theirs, ours = getattr(variant, field), getattr(attached, field)
        if theirs != ours:
            differences.append(f"{field}={theirs!r} in the file, {field}={ours!r} in the model")
    return "; ".join(differences)


def _refuse_other_dtypes(path: FilePath, saved: Tensors, attached: Tensors) -> None:
    differences = [
        f"{key}: {tensor.dtype} in the file, {attached[key].dtype} in the model"
        for key, tensor in saved.items()
        if key in attached and attached[key].dtype != tensor.dtype
    ]
    if differences:
        raise AdapterFileError(
            f"{path} was saved in another precision",
            details=differences,
            fix=f"Attach with the dtype= that it was saved with; or {ANOTHER_WAY}",
            path=str(path),
            tensors=tuple(line.partition(":")[0] for line in differences),
        )


def _refuse_other_base(adapter: Adapter, path: FilePath, described: Metadata) -> None:
    sites = {
        site.path: site for _, site, _ in adapter._each() if site.path in described.fingerprint
    }
    other = changed(described.fingerprint, sites)
    if other:
        raise BaseMismatchError(
            f"{path} was saved on a base with other weights: {len(other)} of {len(sites)} layers "
            "differ by more than rounding to bfloat16",
            details=other,
            fix=f"Train on the base that it was trained on; or {ANOTHER_WAY}",
            path=str(path),
        )


def _derived(adapter: Adapter, path: FilePath, described: Metadata) -> dict[str, Tensor]:
    """The derived tensors, which a file without them can only verify."""
    full, slim = adapter.state_dict(), adapter.state_dict(derived=False)
    derived = {key: tensor for key, tensor in full.items() if key not in slim}
    wrong = [
        key
        for key, tensor in derived.items()
        if key not in described.probes or not probe_agrees(tensor, described.probes[key])
    ]
    if wrong:
        raise BaseMismatchError(
            f"{path} was saved without its derived tensors, and {len(wrong)} of the attached ones "
            "are not those",
            details=wrong,
            fix="Restore from a file that was saved with derived=True",
            path=str(path),
            tensors=tuple(wrong),
        )
    return derived
