"""Saving an adapter: what its file says, and the checks before it is written.

Whatever `load` would refuse is refused here first, and what the file cannot hold is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lite.adapter_state import derived_tensors
from lora_lite.arguments import flag
from lora_lite.attachment import AdapterState
from lora_lite.base import Base
from lora_lite.errors import AdapterFileError
from lora_lite.fileformat import DTYPES, FilePath, dtypes_of, write
from lora_lite.fingerprint import fingerprint, probe
from lora_lite.format_plugins import format_named
from lora_lite.formats import refuse_other_layers, refuse_unknown_options
from lora_lite.layers import is_dtensor, whole
from lora_lite.magnitudes import not_finite
from lora_lite.metadata import Configuration, Metadata
from lora_lite.modules import layer_modules, plain_path
from lora_lite.notices import (
    still_at_start,
    tell_idle,
    tell_statistics,
    tell_unsaved,
    uncalled_layers,
)
from lora_lite.plugins import CORE, provider
from lora_lite.registry import registry_of
from lora_lite.site import Site
from lora_lite.statistics import changed_statistics
from lora_lite.variant import Variant

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter


def save_adapter(
    path: FilePath, adapter: Adapter, derived: bool, options: Mapping[str, Any]
) -> None:
    """Write an adapter's file. See `Adapter.save`."""
    if options:
        raise AdapterFileError(
            f"lora-lite's own file has no options to take: {', '.join(map(repr, options))}",
            fix="Options are for other formats, such as format='peft'",
            path=str(path),
        )
    left_out = {} if flag(derived, "derived") else derived_tensors(adapter)
    if not derived and not left_out:
        raise AdapterFileError(
            f"derived=False: nothing of {adapter._state.recipe} is derived from the base alone",
            fix="Leave derived= out",
            path=str(path),
        )
    tensors = adapter.state_dict(derived)
    sites = {site.path: site for _, site, _ in adapter._each()}
    write_adapter(path, adapter._root, adapter._state, sites, tensors, left_out)


def write_format(
    path: FilePath, adapter: Adapter, name: str, derived: bool, options: Mapping[str, Any]
) -> None:
    """Write an adapter in another format than lora-lite's own. See `Adapter.save`."""
    chosen = format_named(name)
    refuse_unknown_options(chosen, options)
    if not derived:
        raise AdapterFileError(
            f"derived=False is for lora-lite's own file, and not for format {name!r}",
            fix="Leave derived= out",
            path=str(path),
        )
    adapter.verify()
    refuse_other_layers(chosen, adapter)
    try:
        chosen.write(adapter, Base(path, adapter._root), Path(path), **options)
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written: {error.strerror or error}", path=str(path)
        ) from error


def write_adapter(
    path: FilePath,
    root: nn.Module,
    state: AdapterState,
    sites: Mapping[str, Site],
    tensors: Mapping[str, Tensor],
    left_out: Mapping[str, Tensor],
) -> None:
    """Write an adapter's file. On a sharded model every process calls this, and rank 0 writes.

    Args:
        path: of the file.
        root: the model.
        state: of the adapter.
        sites: its layers.
        tensors: what goes into the file.
        left_out: the derived tensors that do not; they are described by probes.

    Raises:
        AdapterFileError: tensors that `load` would refuse, or a path that cannot be written.
    """
    _refuse_unloadable(path, tensors)
    variants = {place: attachment.variant for place, attachment in state.attachments.items()}
    configurations = list(dict.fromkeys(variants.values()))
    index = {variant: number for number, variant in enumerate(configurations)}
    described = Metadata(
        core=metadata.version(CORE),
        configurations=[_configuration(variant) for variant in configurations],
        sites={place: index[variant] for place, variant in variants.items()},
        seed=state.seed,
        scale=state.scale,
        dtypes=dtypes_of(tensors),
        derived=not left_out,
        uses_base=state.uses_base,
        fingerprint=fingerprint(
            site for place, site in sites.items() if not variants[place].replaces_weights
        ),
        probes={key: probe(whole(value)) for key, value in left_out.items()},
    )
    _tell(root, state)
    is_sharded = any(is_dtensor(parameter) for parameter in root.parameters())
    if not is_sharded or torch.distributed.get_rank() == 0:
        write(path, tensors, described)


def _configuration(variant: Variant) -> Configuration:
    return Configuration(
        variant=variant.name,
        variant_format=variant.format,
        provider=" ".join(provider(type(variant))).strip(),
        fields=variant.model_dump_json(),
    )


def _refuse_unloadable(path: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """An error for tensors that `load` would refuse."""
    wrong = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            wrong[key] = f"dtype {tensor.dtype} is not kept in files"
        elif tensor.numel() == 0:
            wrong[key] = "it is empty; is the model sharded by ZeRO-3?"
    wrong.update(dict.fromkeys(not_finite(tensors), "has values that are not finite"))
    if wrong:
        raise AdapterFileError(
            f"the adapter cannot be saved: {len(wrong)} of its tensors could not be loaded again",
            details=[f"{key}: {reason}" for key, reason in wrong.items()],
            fix="A training that diverged leaves such values: go back to an earlier checkpoint",
            path=str(path),
            tensors=tuple(wrong),
        )


def _tell(root: nn.Module, state: AdapterState) -> None:
    """Warn of what the file does not hold, and of what has no effect."""
    registry = registry_of(root)
    assert registry is not None
    trained = [plain_path(n) for n, p in root.named_parameters() if p.requires_grad]
    tell_unsaved([name for name in trained if name in registry.trainable])
    tell_statistics(changed_statistics(root, registry.statistics))
    if state.was_trained and not state.is_loaded:
        tell_idle(state.scale, uncalled_layers(root, [state]), _unchanged(root, state))
    else:
        tell_idle(state.scale, (), ())


def _unchanged(root: nn.Module, state: AdapterState) -> Sequence[str]:
    """The layers whose parameters are still at their start, by path."""
    unchanged = []
    modules = layer_modules(root)
    for path, attachment in state.attachments.items():
        stored = attachment.stored(modules[path])
        trainable = [stored[name] for name, spec in attachment.specs.items() if spec.trainable]
        if trainable and still_at_start(trainable):
            unchanged.append(path)
    return unchanged
