"""Attach a variant to a model; find and detach what is attached."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.arguments import (
    Indices,
    Overrides,
    Patterns,
    adapter_name,
    seed_number,
    trainable_dtype,
)
from lora_lite.attachment import AdapterState
from lora_lite.author_mistakes import calling, checked_identity, checked_tensors, contract_error
from lora_lite.calibration import Calibration, Loss, check_data
from lora_lite.errors import AdapterError, TargetError
from lora_lite.lost import refuse_lost_layers
from lora_lite.magnitudes import not_finite
from lora_lite.modules import layer_modules, root_of
from lora_lite.notices import tell_frozen, tell_zero_weights
from lora_lite.placements import Placement, place, plan
from lora_lite.registry import (
    CHANGING,
    adapted_root,
    install,
    open_model,
    registry_of,
    release_changing,
    take_off,
    undo,
)
from lora_lite.shared import one_for_all
from lora_lite.state import flat, not_as_declared, start_values
from lora_lite.unfit import refuse_unfit
from lora_lite.variant import Tensors, Variant
from lora_lite.wrapped import refuse_wrapped


def attach(
    model: nn.Module,
    variant: str | Variant | Mapping[str, Any],
    /,
    *,
    name: str = "default",
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: Indices = None,
    overrides: Overrides = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> Adapter:
    """Attach a variant to the linear layers of a model.

    All or nothing: after an error, or an interruption at any line, the model is as it was. The base
    is frozen (`detach` restores its `requires_grad`), and only the adapter's parameters train.

    Args:
        model: any module; its base weights are read, never written.
        variant: the name of an installed variant, an instance of a `Variant` subclass, or a recipe
            `{regular expression: variant}`; see `plan`.
        name: of the adapter, for several on one model.
        targets: which layers; see `plan` for this and the next three.
        exclude: which layers to leave out.
        layers: indices of the repeated blocks.
        overrides: other hyperparameters for some layers.
        calibration: model inputs (mappings, tuples or tensors; a DataLoader works), if the variant
            needs them.
        loss: a function of the model's output and the batch, if the variant needs gradients of the
            calibration data; None takes the output's `loss`.
        dtype: of the trainable tensors. It is float32 also on a bfloat16 base, unless told
            otherwise, since bfloat16 loses small updates.
        seed: of the random start values, which depend on the seed, the adapter's name, the layer's
            path and the tensor's name alone.
        fields: the hyperparameters, if `variant` is a name.

    Raises:
        UnknownVariantError, PluginError, FieldError, TargetError, LayerKindError, MisfitError: as
            `plan`.
        CalibrationError: calibration data or the loss is missing, not needed, empty or rejected.
        AdapterError: the name is in use, or the model cannot carry an adapter as it is.

    Warns:
        AdapterWarning: something stays frozen that may be meant to train.
    """
    adapter_name(name)
    dtype = trainable_dtype(dtype)
    root = root_of(model)
    state: AdapterState | None = None
    pass_over_data: Calibration | None = None
    modules: dict[str, nn.Module] = {}
    try:
        CHANGING.acquire()
        refuse_wrapped(root)
        chosen = plan(
            model,
            variant,
            targets=targets,
            exclude=exclude,
            layers=layers,
            overrides=overrides,
            **fields,
        )
        zero = refuse_unfit(root, chosen.placements, name)
        for each in chosen.recipe.variants:
            checked_identity(each)
        modules.update((placement.path, placement.module) for placement in chosen.placements)
        state = AdapterState(name, chosen.recipe, seed_number(seed))
        pass_over_data = Calibration(root, chosen.placements, _states(root).values())
        check_data(chosen.placements, pass_over_data.observers, calibration, loss)
        registry = open_model(root, chosen._layers)
        statistics = pass_over_data.run(calibration, loss)
        placements = _specialized(chosen.placements, statistics)
        values = _start(placements, statistics, state, dtype)
        install(root, state, placements, values)
        tell_frozen(root, chosen, registry.trainable)
        replaced = {p.path for p in placements if p.variant.replaces_weights}
        tell_zero_weights([path for path in zero if path not in replaced])
        adapter = Adapter(root, state, modules)
        CHANGING.release()
        return adapter
    except BaseException:
        if pass_over_data is not None:
            pass_over_data.restore()
        if state is not None:
            undo(root, state, modules)
        release_changing()
        raise


# --- what is attached


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name.

    It finds them on a copy as well, on an unpickled model, and inside a wrapper (DDP,
    `torch.compile`).

    Raises:
        AdapterError: `model` is only a part of the model through which they were attached; or a
            layer that an adapter is on was replaced or removed.
    """
    root = adapted_root(model)
    modules = layer_modules(root)
    for state in _states(root).values():
        refuse_lost_layers(root, state)
    return {name: Adapter(root, state, modules) for name, state in _states(root).items()}


def adapter_of(model: nn.Module, name: str | None) -> Adapter:
    """The adapter called `name`, or the only one.

    Raises:
        AdapterError: there is none of this name; or no name was given, and there is not just one.
    """
    found = adapters(model)
    return found[_chosen_name(found, name)]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Detach the adapter called `name`, or the only one.

    After the last one, the model is bit for bit what it was. It works also if a layer was replaced
    or removed meanwhile.

    Raises:
        AdapterError: see `adapter_of`; or the model's parameters are sharded.
    """
    root = adapted_root(model)
    states = _states(root)
    state = states[_chosen_name(states, name)]
    take_off(root, state, {})


def _states(root: nn.Module) -> dict[str, AdapterState]:
    registry = registry_of(root)
    return dict(registry.adapters) if registry is not None else {}


def _chosen_name(found: Mapping[str, object], name: str | None) -> str:
    if name is None and len(found) == 1:
        return next(iter(found))
    if not isinstance(name, str) or name not in found:
        have = ", ".join(sorted(found)) or "none"
        if name is None:
            problem = f"the model has {len(found)} adapters, so one must be named"
        else:
            problem = f"the model has no adapter named {name!r}"
        raise AdapterError(problem, expected=f"It has: {have}", fix="Give name=", adapter=str(name))
    return name


# --- steps of attach


def _specialized(
    placements: Sequence[Placement], statistics: Mapping[str, Tensors]
) -> Sequence[Placement]:
    """Let each variant choose other hyperparameters for its own layers from their statistics."""
    chosen: dict[str, Variant | None] = {p.path: p.variant for p in placements}
    for variant in dict.fromkeys(placement.variant for placement in placements):
        sites = {p.path: p.site for p in placements if p.variant == variant}
        theirs = {path: statistics.get(path, {}) for path in sites}
        with calling(variant, "specialize"):
            changed = dict(variant.specialize(sites, theirs))
        for path, other in changed.items():
            if path not in sites or not (other is None or type(other) is type(variant)):
                raise contract_error(
                    variant,
                    "specialize",
                    f"gives {path!r} the variant {other}",
                    expected="It may give its own layers a variant of its own class, or None",
                )
        chosen.update(changed)
    if all(placement.variant is chosen[placement.path] for placement in placements):
        return placements
    kept = [(p, chosen[p.path]) for p in placements]
    specialized = place(
        (p.path, p.module, p.layer.kind, variant) for p, variant in kept if variant is not None
    )
    if not specialized:
        raise TargetError(
            f"{placements[0].variant.name} drops every one of its {len(placements)} layers",
            argument="targets",
        )
    return specialized


@torch.no_grad()
def _start(
    placements: Sequence[Placement],
    statistics: Mapping[str, Tensors],
    state: AdapterState,
    dtype: torch.dtype,
) -> dict[str, dict[str, Tensor]]:
    """The start values of every layer, by path and name."""
    values = {}
    shared: dict[str, Tensor] = {}
    for placement in placements:
        site, variant, path = placement.site, placement.variant, placement.path
        rng = partial(_generator, state.seed, state.name, placement)
        with calling(variant, "derive", path):
            given = placement.methods.derive(site)
        derived = checked_tensors(variant, "derive", given, path)
        with calling(variant, "init", path):
            given = placement.methods.init(site, derived, statistics.get(path, {}), rng)
        started = checked_tensors(variant, "init", given, path)
        state.uses_base |= site.weight_was_read and not variant.replaces_weights
        own = start_values(placement, {**derived, **started}, dtype)
        values[path] = one_for_all(variant.name, placement.specs, own, shared)
    broken = not_finite(flat(placements, values))
    if broken:
        lines = [f"{key}: has values that are not finite" for key in broken]
        raise not_as_declared(_first_with(placements, broken[0]), lines)
    return values


def _first_with(placements: Iterable[Placement], key: str) -> Placement:
    return next(each for each in placements if key in map(each.key, each.specs))


def _generator(seed: int, adapter: str, placement: Placement, tensor: str) -> torch.Generator:
    """It depends on seed, adapter, layer and tensor alone; for what layers share, not on the layer.

    The default name adds nothing, so that runs from before the name counted can be repeated.
    """
    shared = placement.shared_keys.get(tensor)
    names = [shared] if shared else [placement.path, tensor]
    if adapter != "default":
        names = [adapter, *names]
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
