"""What a model remembers of its adapters, and the only code that changes a model: `install` and `remove`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_lite.errors import AdapterError
from lora_lite.hooks import Control, Entry, SiteHooks, attribute, hooks_of
from lora_lite.layers import is_dtensor
from lora_lite.targets import Placement, named_modules, root_of

KEY = "_lora_lite"


class Registry:
    """Lives on the root module, and is copied and pickled with it.

    Attributes:
        controls: the attached adapters by name.
        hooks: the hooked layers by path.
        trainable: names of the base parameters that required a gradient before the first adapter came.
    """

    def __init__(self, trainable: frozenset[str]) -> None:
        self.controls: dict[str, Control] = {}
        self.hooks: dict[str, SiteHooks] = {}
        self.trainable = trainable


def registry_of(root: nn.Module) -> Registry | None:
    """The registry on this very module, if it has one."""
    found: Registry | None = root.__dict__.get(KEY)
    return found


def adapted_root(model: nn.Module) -> nn.Module | None:
    """The module inside `model` (or `model` itself) through which adapters were attached, if any were.

    Raises:
        AdapterError: `model` is only a part of the module through which they were attached, or holds two such modules.
    """
    root = root_of(model)
    found = [module for module in root.modules() if registry_of(module) is not None]
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module in found)
        raise AdapterError(
            f"adapters were attached through {len(found)} modules of this model ({names}); "
            "detach all but one of them, each through the module it was attached through"
        )
    if found:
        return found[0]
    if any(hooks_of(module) for module in root.modules()):
        raise AdapterError(
            f"this {type(root).__name__} is a part of a larger model through which its adapters were attached; "
            "use that larger model here"
        )
    return None


def refuse_unfit(root: nn.Module, placements: Sequence[Placement], name: str) -> None:
    """Everything about the model that forbids to attach, before anything is changed.

    Raises:
        AdapterError: a bad or used name, another root, a sharded, meta or offloaded base, an attribute in the way.
    """
    if not name.isidentifier():
        raise AdapterError(f"name={name!r}: an adapter's name is made of letters, digits and underscores")
    found = adapted_root(root)
    registry = registry_of(found) if found is not None else None
    if found is not None and found is not root:
        raise AdapterError(
            f"adapters were attached through a part of this model ({type(found).__name__}); attach this one through the same "
            "part, or detach those first"
        )
    if registry and name in registry.controls:
        raise AdapterError(
            f"an adapter named {name!r} is attached already; detach it, or give this one another name= "
            f"(in use: {', '.join(sorted(registry.controls))})"
        )
    for placement in placements:
        _refuse_layer(placement, name)


def refuse_wrapped(root: nn.Module) -> None:
    """Raises `AdapterError` for a model that DDP or FSDP2 has prepared already: it would not reduce new gradients."""
    if isinstance(root, nn.parallel.DistributedDataParallel):
        raise AdapterError(
            "the model is wrapped in DistributedDataParallel: attach or load on the module itself, before it is wrapped, or "
            "gradients of the adapter would silently not be reduced"
        )
    refuse_sharded(root)


def refuse_sharded(root: nn.Module) -> None:
    """Raises `AdapterError` for a model whose parameters are sharded already."""
    if any(is_dtensor(p) for p in root.parameters()):
        raise AdapterError(
            "the model's parameters are sharded (DTensor): attach, load and detach before fully_shard(), or gradients of the "
            "adapter would silently not be reduced"
        )


def install(
    root: nn.Module, control: Control, placements: Sequence[Placement], values: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Register tensors and hooks, freeze the base. All or nothing."""
    registry = registry_of(root) or _start(root)
    registry.controls[control.name] = control
    try:
        for placement in placements:
            _install_site(registry, Entry(control, placement), placement.module, values[placement.spot.path])
    except BaseException:
        remove(root, control)
        raise


def remove(root: nn.Module, control: Control) -> None:
    """Take one adapter off; the last one to leave restores the base's `requires_grad` and removes every trace."""
    registry = registry_of(root)
    assert registry is not None
    modules = dict(named_modules(root))
    for path, entry in control.entries.items():
        module = modules[path]
        for key in entry.attributes.values():
            if key in module._parameters:
                delattr(module, key)
        hooks = registry.hooks[path]
        hooks.drop(entry)
        if not hooks.entries:
            hooks.unregister()
            del registry.hooks[path]
            entry.spot.kind.exit(module)
    control.entries = {}
    del registry.controls[control.name]
    if not registry.controls:
        for name, parameter in _named_parameters(root):
            parameter.requires_grad_(name in registry.trainable)
        del root.__dict__[KEY]


def _start(root: nn.Module) -> Registry:
    registry = Registry(frozenset(name for name, p in _named_parameters(root) if p.requires_grad))
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    root.__dict__[KEY] = registry
    return registry


def _install_site(registry: Registry, entry: Entry, module: nn.Module, values: Mapping[str, Tensor]) -> None:
    path = entry.spot.path
    if path not in registry.hooks:
        entry.spot.kind.enter(module)
        registry.hooks[path] = SiteHooks()
        registry.hooks[path].register(module)
    entry.control.entries[path] = entry
    for name, spec in entry.specs.items():
        module.register_parameter(entry.attributes[name], nn.Parameter(values[name], requires_grad=spec.trainable))
    registry.hooks[path].add(entry)


def _refuse_layer(placement: Placement, name: str) -> None:
    path, module = placement.spot.path, placement.module
    if any(p.device.type == "meta" for p in module.parameters()):
        raise AdapterError(
            f"{path} is on the meta device (offloaded, or not loaded yet): an adapter there would silently do nothing. Load "
            "the weights onto a real device first; plan() works on meta"
        )
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise AdapterError(f"{path} is offloaded by accelerate; load the model without offloading this layer")
    taken = [key for tensor in placement.specs if hasattr(module, key := attribute(name, tensor))]
    if taken:
        raise AdapterError(f"{path} has an attribute {taken[0]!r} already; give the adapter another name=")


def _named_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once, under the path of its first module, without the names that wrappers add."""
    seen: dict[nn.Parameter, str] = {}
    for path, module in named_modules(root):
        for name, parameter in module.named_parameters(recurse=False):
            seen.setdefault(parameter, f"{path}.{name}")
    return [(name, parameter) for parameter, name in seen.items()]
