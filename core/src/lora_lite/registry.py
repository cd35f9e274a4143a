"""What a model remembers of its adapters, and the only code that changes a model: `opened`, `install` and `remove`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lora_lite.errors import AdapterError
from lora_lite.hooks import Control, Entry, SiteHooks, attribute, hooks_of
from lora_lite.layers import LayerKind, is_dtensor
from lora_lite.plugins import kind_of
from lora_lite.targets import Placement, find_layers, named_modules, plain_path, root_of
from lora_lite.variant import Tensors

KEY = "_lora_lite"


class Registry:
    """Lives on the root module, and is copied and pickled with it.

    Attributes:
        controls: the attached adapters by name.
        entered: the kinds of the layers that were entered, by path.
        trainable: names of the base parameters that required a gradient before the first adapter came.
    """

    def __init__(self, root: nn.Module) -> None:
        self.controls: dict[str, Control] = {}
        self.entered: dict[str, LayerKind] = {}
        self.trainable = frozenset(
            plain_path(name) for name, p in root.named_parameters() if p.requires_grad
        )


def adapted_root(model: nn.Module) -> tuple[nn.Module, dict[str, Control]]:
    """The module inside `model` (or `model` itself) through which adapters were attached, and these; without any, the
    module itself.

    Raises:
        AdapterError: `model` is only a part of the module through which they were attached, or holds two such modules.
    """
    root = root_of(model)
    found = [
        (module, registry.controls)
        for module in root.modules()
        if (registry := module.__dict__.get(KEY))
    ]
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        raise AdapterError(
            f"adapters were attached through {len(found)} modules of this model ({names}); detach all but one"
        )
    if not found and any(map(hooks_of, root.modules())):
        whole = f"this {type(root).__name__} is a part of a larger model through which its adapters were attached"
        raise AdapterError(f"{whole}; use that larger model here")
    return found[0] if found else (root, {})


def refuse_wrapped(root: nn.Module) -> None:
    """Raises `AdapterError` for a model that DDP or FSDP2 has prepared already: it would not reduce new gradients."""
    wrapped = isinstance(root, nn.parallel.DistributedDataParallel)
    if wrapped or any(map(is_dtensor, root.parameters())):
        what = (
            "is wrapped in DistributedDataParallel"
            if wrapped
            else "has sharded parameters (DTensor)"
        )
        why = "or gradients of the adapter would silently not be reduced"
        raise AdapterError(
            f"the model {what}: attach, load and detach before it is wrapped, and before fully_shard(), {why}"
        )


def refuse_unfit(root: nn.Module, placements: Sequence[Placement], name: str) -> None:
    """Everything about the model that forbids to attach, before anything is changed.

    Raises:
        AdapterError: a bad or used name, another root, a meta or offloaded base, an attribute in the way.
    """
    if not name.isidentifier():
        raise AdapterError(
            f"name={name!r}: an adapter's name is made of letters, digits and underscores"
        )
    found, controls = adapted_root(root)
    if found is not root:
        part = f"a part of this model ({type(found).__name__})"
        raise AdapterError(
            f"adapters were attached through {part}; attach this one there too, or detach those first"
        )
    if name in controls:
        used = ", ".join(sorted(controls))
        raise AdapterError(
            f"an adapter named {name!r} is attached already; detach it, or give another name= (in use: {used})"
        )
    for placement in placements:
        path, module = placement.spot.path, placement.module
        if any(p.device.type == "meta" for p in module.parameters()):
            why = "is on the meta device (offloaded, or not loaded yet): an adapter there would silently do nothing"
            raise AdapterError(
                f"{path} {why}. Load the weights onto a real device first; plan() works on meta"
            )
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise AdapterError(
                f"{path} is offloaded by accelerate; load the model without offloading this layer"
            )
        if taken := [
            key for tensor in placement.specs if hasattr(module, key := attribute(name, tensor))
        ]:
            raise AdapterError(
                f"{path} has an attribute {taken[0]!r} already; give the adapter another name="
            )


@contextmanager
def opened(root: nn.Module) -> Iterator[Registry]:
    """The registry. With the first adapter the base is frozen; every layer of a known kind is entered, since what comes of one
    layer's adapter goes through the others. Undone where no adapter came of it, or the last one left.
    """
    registry: Registry = root.__dict__.get(KEY) or Registry(root)
    if KEY not in root.__dict__:
        root.__dict__[KEY] = registry
        root.requires_grad_(False)
    try:
        for layer in find_layers(root):
            if layer.path not in registry.entered and (kind := kind_of(layer.module)):
                kind.enter(layer.module)
                registry.entered[layer.path] = kind
        yield registry
    finally:
        if not registry.controls and KEY in root.__dict__:
            modules = dict(named_modules(root))
            for path, kind in registry.entered.items():
                kind.exit(modules[path])
            for name, parameter in root.named_parameters():
                parameter.requires_grad_(plain_path(name) in registry.trainable)
            del root.__dict__[KEY]


def install(
    root: nn.Module,
    control: Control,
    placements: Sequence[Placement],
    values: Mapping[str, Tensors],
) -> None:
    """Register tensors and hooks. All or nothing."""
    with opened(root) as registry:
        registry.controls[control.name] = control
        try:
            for placement in placements:
                path, module, entry = (
                    placement.spot.path,
                    placement.module,
                    Entry(control, placement),
                )
                control.entries[path] = entry
                for name, spec in entry.specs.items():
                    tensor = nn.Parameter(values[path][name], requires_grad=spec.trainable)
                    module.register_parameter(entry.attributes[name], tensor)
                (hooks_of(module) or SiteHooks(module)).add(entry)
        except BaseException:
            remove(root, control)
            raise


def remove(root: nn.Module, control: Control) -> None:
    """Take one adapter off; the last one to leave restores the base's `requires_grad` and removes every trace."""
    with opened(root) as registry:
        modules = dict(named_modules(root))
        for path, entry in control.entries.items():
            for key in entry.attributes.values():
                modules[path]._parameters.pop(key, None)
            if hooks := hooks_of(modules[path]):
                hooks.remove(entry)
        control.entries = {}
        del registry.controls[control.name]
