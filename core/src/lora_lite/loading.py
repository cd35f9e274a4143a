"""Putting tensors that were read somewhere onto a model, all or nothing.

`checkpoint.load` reads lora-lite's own file, `load_foreign` asks another format. What they share is
here as well: the layers of the file in this model, and the last step.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import AdapterState
from lora_lite.author_mistakes import calling
from lora_lite.base import Base
from lora_lite.errors import AdapterFileError, MisfitError
from lora_lite.fileformat import FilePath
from lora_lite.find import find_layers, kind_at
from lora_lite.formats import ForeignAdapter, Format
from lora_lite.layers import class_name, looks_linear
from lora_lite.missing import refuse_missing
from lora_lite.modules import layer_modules, named_modules, root_of
from lora_lite.placements import Placement, place
from lora_lite.recipe import Recipe
from lora_lite.registry import CHANGING, install, open_model, release_changing, undo
from lora_lite.rename import Renaming, new_paths
from lora_lite.shared import one_for_all
from lora_lite.state import flat, own_copies, refuse_overflow, unpack
from lora_lite.unfit import refuse_taken_name, refuse_unfit
from lora_lite.variant import Tensors, Variant
from lora_lite.wrapped import refuse_wrapped

# --- another format


def load_foreign(
    chosen: Format,
    path: Path,
    model: nn.Module,
    name: str,
    dtype: torch.dtype | None,
    rename: Renaming,
) -> Adapter:
    """Attach the adapter at a path of another format. See `checkpoint.load`."""
    with CHANGING:
        return _load_foreign(chosen, path, model, name, dtype, rename)


def _load_foreign(
    chosen: Format,
    path: Path,
    model: nn.Module,
    name: str,
    dtype: torch.dtype | None,
    rename: Renaming,
) -> Adapter:
    root = root_of(model)
    refuse_wrapped(root)
    foreign = chosen.read(path, Base(path, root, rename))
    foreign = _renamed(path, foreign, rename)
    placements = placed(path, root, foreign.variants)
    refuse_unfit(root, placements, name)
    tensors = {p.path: _with_derived(p, foreign.tensors.get(p.path, {})) for p in placements}
    unpacked = unpack(placements, flat(placements, tensors))
    values = own_values(placements, unpacked, dtype)
    refuse_overflow(flat(placements, values))
    recipe = Recipe(first_of_each_class(foreign.variants.values()))
    state = AdapterState(name, recipe, seed=0, scale=foreign.scale, is_loaded=True)
    return put_on(root, placements, values, state)


def _renamed(path: Path, foreign: ForeignAdapter, rename: Renaming) -> ForeignAdapter:
    own = new_paths(path, list(foreign.variants), rename)
    return ForeignAdapter(
        variants={own[place]: variant for place, variant in foreign.variants.items()},
        tensors={own[place]: tensors for place, tensors in foreign.tensors.items()},
        scale=foreign.scale,
    )


@torch.no_grad()
def _with_derived(placement: Placement, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of one layer, and those that are computed from the base."""
    missing = {name for name, spec in placement.specs.items() if spec.derived} - tensors.keys()
    if not missing:
        return dict(tensors)
    with calling(placement.variant, "derive", placement.path):
        derived = placement.methods.derive(placement.site)
    return {**tensors, **{name: derived[name] for name in missing}}


# --- what every way to load shares


def placed(
    path: FilePath, root: nn.Module, variants: Mapping[str, Variant]
) -> tuple[Placement, ...]:
    """The layers of a file in this model.

    Raises:
        AdapterFileError: the model does not have some of them, or the file has none.
        LayerKindError: as `place`.
    """
    if not variants:
        raise AdapterFileError(f"{path} adapts no layer", path=str(path))
    modules = layer_modules(root)
    refuse_missing(path, root, variants, modules)
    kinds = {where: kind_at(where, modules, variant) for where, variant in variants.items()}
    other = [w for w, kind in kinds.items() if kind is None and not looks_linear(modules[w])]
    if other:
        raise AdapterFileError(
            f"{path} adapts {len(other)} modules that are no linear layers in this model",
            details=[f"{where!r}: {class_name(modules[where])}" for where in other],
            fix="Load the model that the adapter was made for",
            path=str(path),
        )
    try:
        return place((w, modules[w], kinds[w], variant) for w, variant in variants.items())
    except MisfitError as error:
        raise AdapterFileError(
            f"{path} does not fit the layers of this model",
            details=error.details,
            fix="Load the model that the adapter was made for",
            path=str(path),
        ) from error


def first_of_each_class(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """What was asked for, as far as a file tells: overrides and specialisation come from one."""
    firsts: dict[str, Variant] = {}
    for variant in variants:
        firsts.setdefault(variant.name, variant)
    return tuple(firsts.values())


def own_values(
    placements: Iterable[Placement], values: Mapping[str, Tensors], dtype: torch.dtype | None
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every layer in memory of their own; the trainable ones in `dtype`."""
    shared: dict[str, torch.Tensor] = {}
    own = {}
    for placement in placements:
        copies = _own_copies(placement, values[placement.path], dtype)
        own[placement.path] = one_for_all(placement.variant.name, placement.specs, copies, shared)
    return own


def _own_copies(
    placement: Placement, values: Tensors, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    dtypes = {
        name: dtype if spec.trainable and spec.dtype is None else None
        for name, spec in placement.specs.items()
    }
    return own_copies(placement, values, dtypes)


def put_on(
    root: nn.Module,
    placements: tuple[Placement, ...],
    values: Mapping[str, Tensors],
    state: AdapterState,
) -> Adapter:
    """Install an adapter whose tensors are known; after an error the model is as it was."""
    modules = {placement.path: placement.module for placement in placements}
    try:
        CHANGING.acquire()
        refuse_taken_name(root, state.name)  # no other thread can come between now
        open_model(root, find_layers(list(named_modules(root))))
        install(root, state, placements, values)
        adapter = Adapter(root, state, modules)
        CHANGING.release()
        return adapter
    except BaseException:
        undo(root, state, modules)
        release_changing()
        raise
