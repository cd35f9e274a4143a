"""Tensors that all layers of an adapter share, kept once: `TensorSpec(shared=...)`.

They are parameters of the model's root, so that copies, checkpoints, optimizers and the outermost
group of FSDP2 find each of them once. A layer finds them by a link to the root, which is no
submodule. In a state dict they come under a name of their own instead of a layer's path:

    shared:vera.A:8x576        variant, tensor and shape
"""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from lora_lite.errors import MisfitError
from lora_lite.tensor_spec import TensorSpec

ROOT = "_lora_lite_root"  # on a layer: the link
NAMES = "_lora_lite_shared"  # on the root: what the shared tensors of all adapters are called there
GROUP = "shared:"


def tensor_key(path: str, variant: str, name: str, spec: TensorSpec | None) -> str:
    """The name of a tensor in a state dict.

    Args:
        path: of the layer.
        variant: its name.
        name: of the tensor.
        spec: of the tensor; None for one that is not declared.
    """
    if spec is None or not spec.shared:
        return f"{path}.{name}"
    return f"{GROUP}{variant}.{spec.shared}:{_sizes(spec)}"


def tensor_name(key: str) -> str:
    """The tensor's own name in its name in a state dict."""
    return key.rpartition(".")[2].partition(":")[0]


def is_shared(key: str) -> bool:
    """Whether a name in a state dict is that of a shared tensor."""
    return key.startswith(GROUP)


def name_on_root(variant: str, spec: TensorSpec) -> str:
    """What a shared tensor is called on the root, after the adapter's name."""
    return f"{variant}_{spec.shared}_{_sizes(spec)}"


def _sizes(spec: TensorSpec) -> str:
    return "x".join(map(str, spec.shape))


# --- on a model


def link(module: nn.Module, root: nn.Module) -> None:
    """Let a layer find the root."""
    module.__dict__[ROOT] = root


def unlink(module: nn.Module) -> None:
    """Undo `link`."""
    module.__dict__.pop(ROOT, None)


def linked_root(module: nn.Module) -> nn.Module:
    """The root that a layer was linked to."""
    root: nn.Module = getattr(module, ROOT)
    return root


def names_on(root: nn.Module) -> Collection[str]:
    """What the shared tensors on a root are called."""
    names: Collection[str] = root.__dict__.get(NAMES, ())
    return names


def put_on_root(root: nn.Module, key: str, value: Tensor, *, trains: bool) -> None:
    """Register a shared tensor, unless another layer's turn has done so."""
    root.__dict__.setdefault(NAMES, set()).add(key)
    if key not in root._parameters:
        root.register_parameter(key, nn.Parameter(value, requires_grad=trains))


def take_off_root(root: nn.Module, keys: Iterable[str]) -> None:
    """Forget the names of shared tensors; with the last name goes the list."""
    names = root.__dict__.get(NAMES)
    if names is not None:
        names.difference_update(keys)
        if not names:
            del root.__dict__[NAMES]


# --- among several layers


def one_for_all(
    variant: str,
    specs: Mapping[str, TensorSpec],
    values: dict[str, Tensor],
    kept: dict[str, Tensor],
) -> dict[str, Tensor]:
    """A layer's tensors, the shared ones as the first layer has them.

    Args:
        variant: its name.
        specs: of the layer's tensors.
        values: of the layer.
        kept: the shared tensors of the layers before, to which this one's are added.
    """
    for name, spec in specs.items():
        if spec.shared:
            key = tensor_key("", variant, name, spec)
            values[name] = kept.setdefault(key, values[name])
    return values


def refuse_other_specs(declared: Iterable[tuple[str, str, Mapping[str, TensorSpec]]]) -> None:
    """An error if layers declare one shared tensor in different ways.

    Args:
        declared: of each layer its path, the name of its variant, and its tensors.

    Raises:
        MisfitError: it names the tensor and two layers.
    """
    first: dict[str, tuple[str, TensorSpec]] = {}
    for path, variant, specs in declared:
        for name, spec in specs.items():
            if spec.shared:
                key = tensor_key(path, variant, name, spec)
                other_path, other = first.setdefault(key, (path, spec))
                if other != spec:
                    raise MisfitError(
                        f"{variant!r} declares the shared tensor {spec.shared!r} in two ways",
                        details=[f"{other_path}: {other}", f"{path}: {spec}"],
                        expected="Layers that share a tensor declare it alike",
                        fix="Give the tensors different names in TensorSpec(shared=...)",
                        layers=(other_path, path),
                    )
