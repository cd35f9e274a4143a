"""What a model remembers of its adapters, and the only code that changes a model.

    first adapter    `open_model`: note what the base is like, freeze it, enter its layers
    every adapter    `install`: tensors and hooks on the layers
                     `remove`: take them away again
    last adapter     `_close_model`: give the base back as it was

Each of these can be interrupted at any line. What it has done by then can be undone, or finished,
by `remove`: every step looks at the model rather than at what it believes to have done, and may be
repeated.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_lite.attachment import AdapterState, Attachment
from lora_lite.compiled import forget_compiled, look_at_hooks
from lora_lite.errors import AdapterError
from lora_lite.expert_attachment import attachment_class
from lora_lite.find import Layer
from lora_lite.hooked import hook_layer, hooks_of, unhook
from lora_lite.layers import LayerKind
from lora_lite.modules import named_modules, plain_path, root_of
from lora_lite.notices import tell_uncalled
from lora_lite.placements import Placement
from lora_lite.resume import add_marker, refuse_other_state, remove_marker, tell_if_saved_whole
from lora_lite.shared import link, put_on_root, take_off_root, unlink
from lora_lite.stand_in import ExpertHooks
from lora_lite.statistics import restore_statistics, running_statistics
from lora_lite.variant import Tensors
from lora_lite.wrapped import refuse_unreduced, refuse_wrapped

KEY = "_lora_lite"

# Held by attach, load and detach. Forwards do not ask for it: they may run on other threads, but
# not on a model that is being changed.
CHANGING = threading.RLock()


def release_changing() -> None:
    """Release the lock of an interrupted call, if it got as far as holding it."""
    with suppress(RuntimeError):
        CHANGING.release()


class Registry:
    """Lives on the root module, and is copied and pickled with it.

    Attributes:
        adapters: the states of the attached adapters, by name.
        entered: the kinds of the layers that were entered, by path.
        trainable: whether each parameter of the base required a gradient, by name.
        flags: the same by the parameter itself, which may get another name. Copies do without.
        statistics: the base's running statistics (of batch normalisation), by name.
    """

    def __init__(self, root: nn.Module) -> None:
        self.adapters: dict[str, AdapterState] = {}
        self.entered: dict[str, LayerKind] = {}
        self.trainable: dict[str, bool] = {}
        self.flags = WeakIdKeyDictionary()
        for name, parameter in root.named_parameters():
            self.trainable[plain_path(name)] = parameter.requires_grad
            self.flags[parameter] = parameter.requires_grad
        self.statistics = running_statistics(root)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "flags"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.flags = WeakIdKeyDictionary()

    def before_forward(self, root: nn.Module, args: Any) -> None:
        """The root's forward pre-hook: parts of the model may have been compiled since attach."""
        if not torch.compiler.is_compiling():
            look_at_hooks()

    def after_forward(self, root: nn.Module, args: Any, output: Any) -> None:
        """The root's forward hook: a first training forward shows what is not called or reduced."""
        if torch.compiler.is_compiling() or not (root.training and torch.is_grad_enabled()):
            return
        new = [state for state in self.adapters.values() if not state.was_trained]
        for state in new:
            state.was_trained = True
        if new:
            refuse_unreduced(root, new)
            tell_uncalled(root, new)

    def before_state_dict(self, *_: Any) -> None:
        """The root's hook on `state_dict`."""
        tell_if_saved_whole(self.adapters)

    def before_load_state_dict(
        self, root: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        """The root's hook on `load_state_dict`: refuses the state of other adapters."""
        refuse_other_state(self.adapters, state_dict, prefix)


def registry_of(root: nn.Module) -> Registry | None:
    """The registry on a module, if adapters were attached through it."""
    registry: Registry | None = root.__dict__.get(KEY)
    return registry


def adapted_root(model: nn.Module) -> nn.Module:
    """The module inside `model`, or `model` itself, through which adapters were attached.

    Without any adapter it is the model itself.

    Raises:
        AdapterError: adapters were attached through a larger model of which this is a part, or
            through several modules of this one.
    """
    root = root_of(model)
    if registry_of(root):
        return root
    modules = list(root.modules())
    found = [module for module in modules if KEY in module.__dict__]
    if len(found) > 1:
        raise AdapterError(
            f"adapters were attached through {len(found)} modules of this model",
            details=[type(module).__name__ for module in found],
            fix="Call this with one of these modules, or detach all adapters but those of one",
        )
    if not found and any(hooks_of(module) for module in modules):
        raise AdapterError(
            f"this {type(root).__name__} is a part of the model through which its adapters were "
            "attached",
            fix="Call this with that larger model",
        )
    return found[0] if found else root


# --- first adapter


def open_model(root: nn.Module, layers: Iterable[Layer]) -> Registry:
    """The registry. If it is new, the base is frozen and its layers are entered.

    All layers are entered, and not only those that get an adapter, since gradients for an adapted
    layer go through the others.
    """
    registry = registry_of(root)
    if registry is None:
        registry = Registry(root)
        root.__dict__[KEY] = registry
        root.requires_grad_(False)
        root.register_forward_pre_hook(registry.before_forward)
        root.register_forward_hook(registry.after_forward)
        root.register_state_dict_pre_hook(registry.before_state_dict)  # type: ignore[no-untyped-call]
        root.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            registry.before_load_state_dict
        )
    for layer in layers:
        if layer.kind is not None and layer.path not in registry.entered:
            registry.entered[layer.path] = layer.kind
            layer.kind.enter(layer.module)
    return registry


# --- every adapter


def install(
    root: nn.Module,
    state: AdapterState,
    placements: Sequence[Placement],
    values: Mapping[str, Tensors],
) -> None:
    """Put an adapter's tensors and hooks on the layers of an opened model."""
    registry = registry_of(root)
    assert registry is not None
    registry.adapters[state.name] = state
    for placement in placements:
        attachment = attachment_class(placement.layer.kind)(
            state, placement.layer, placement.variant, dict(placement.specs)
        )
        state.attachments[placement.path] = attachment
        _register(root, placement.module, attachment, values[placement.path])
        hook_layer(placement.module).add(attachment)
    add_marker(placements[0].module, state)
    forget_compiled()


def _register(root: nn.Module, module: nn.Module, attachment: Attachment, values: Tensors) -> None:
    """Put the tensors of one layer where they are kept."""
    if attachment.shared:
        link(module, root)
    for name, key in attachment.keys.items():
        trains = attachment.specs[name].trainable
        if name in attachment.shared:
            put_on_root(root, key, values[name], trains=trains)
        else:
            module.register_parameter(key, nn.Parameter(values[name], requires_grad=trains))


def remove(root: nn.Module, state: AdapterState, modules: Mapping[str, nn.Module]) -> None:
    """Take an adapter off the model; the last one to leave gives the base back as it was.

    It may be called again after an interruption, and on an adapter that is there only in part.

    Args:
        root: through which the adapter was attached.
        state: of the adapter.
        modules: the layers by path, as they were at attach. All that the model holds now are
            cleaned as well: layers may have been replaced, or moved to other paths.
    """
    now = dict(named_modules(root))
    keys = {key for each in state.attachments.values() for key in each.keys.values()}
    for module in {*modules.values(), *now.values()}:
        _clean(module, state, keys)
    take_off_root(root, keys)
    registry = registry_of(root)
    if registry is not None:
        if registry.adapters.get(state.name) is state:
            del registry.adapters[state.name]
        if not registry.adapters:
            _close_model(root, registry, now)
    if state.attachments:  # else nothing was compiled with it
        forget_compiled()
        state.attachments = {}


def take_off(root: nn.Module, state: AdapterState, modules: Mapping[str, nn.Module]) -> None:
    """Detach an adapter. If that is interrupted, it is finished first.

    Args:
        root, state, modules: as for `remove`.

    Raises:
        AdapterError: another thread was first, or the model's parameters are sharded.
    """
    try:
        CHANGING.acquire()
        refuse_detached(state)
        refuse_wrapped(root)
        remove(root, state, modules)
        CHANGING.release()
    except AdapterError:
        release_changing()
        raise
    except BaseException:
        remove(root, state, modules)
        release_changing()
        raise


def refuse_detached(state: AdapterState) -> None:
    """An error for an adapter that is on no model any more."""
    if not state.attachments:
        raise AdapterError(
            f"adapter {state.name!r} ({state.recipe}) is detached", adapter=state.name
        )


def undo(root: nn.Module, state: AdapterState, modules: Mapping[str, nn.Module]) -> None:
    """Take away what an interrupted attach or load has done.

    What interrupted it is what the caller shall hear of, and not a layer kind that fails meanwhile.
    """
    with suppress(Exception):
        remove(root, state, modules)


def _clean(module: nn.Module, state: AdapterState, keys: Iterable[str]) -> None:
    for key in keys:
        module._parameters.pop(key, None)
    remove_marker(module, state)
    hooks = hooks_of(module)
    if hooks is not None:
        if isinstance(hooks, ExpertHooks):
            hooks.leave(module)
        hooks.remove(state)
        if not hooks.attachments:
            unhook(module, hooks)
            unlink(module)


# --- last adapter


def _close_model(root: nn.Module, registry: Registry, modules: Mapping[str, nn.Module]) -> None:
    """Undo `open_model`. A layer kind that fails is reported after everything else is done."""
    failures: list[Exception] = []
    for path, kind in list(registry.entered.items()):
        try:
            if path in modules:
                kind.exit(modules[path])
        except Exception as error:
            failures.append(error)
        registry.entered.pop(path, None)
    for name, parameter in root.named_parameters():
        by_name = registry.trainable.get(plain_path(name), parameter.requires_grad)
        trains = registry.flags.get(parameter, by_name)  # type: ignore[no-untyped-call]
        if parameter.requires_grad != trains:
            parameter.requires_grad_(trains)
    restore_statistics(root, registry.statistics)
    unhook(root, registry)
    root.__dict__.pop(KEY, None)
    if failures:
        raise failures[0]
