"""What a plain checkpoint of an adapted model holds: the base's tensors, some of them merged.

Nothing is computed until a tensor is read, one at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.attachment import Attachment, attribute
from lora_lite.author_mistakes import RESERVED
from lora_lite.change import LayerChange, changes_at
from lora_lite.errors import AdapterError
from lora_lite.experts import ExpertStack
from lora_lite.kinds import BUILT_IN
from lora_lite.layers import LayerKind
from lora_lite.low_rank import offset_of
from lora_lite.merged import merged_bias, merged_layer
from lora_lite.modules import named_modules
from lora_lite.plugins import kind_of
from lora_lite.registry import registry_of


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint.

    Attributes:
        size: in bytes.
        read: gives it; what is computed is computed then.
    """

    size: int
    read: Callable[[], Tensor]


@dataclass
class Contents:
    """The tensors of a checkpoint.

    Attributes:
        entries: by name, without those of adapters. A weight that is tied to another is there once.
        is_untied: whether a weight that is tied in the base is adapted in one place alone.
        is_dequantised: whether weights are plain that are quantised in the base.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    is_untied: bool = False
    is_dequantised: bool = False


def plain_contents(root: nn.Module, adapter: Adapter, dequantise: bool) -> Contents:
    """The contents of a plain checkpoint with one adapter merged.

    Args:
        root: the model.
        adapter: on it. Other adapters are left out.
        dequantise: whether quantised weights may become plain ones.

    Raises:
        AdapterError: the base is quantised and may not be dequantised; or a layer without a bias
            would need one.
    """
    ours = _names_of_adapters(root)
    changes, replaced = _changes(adapter)
    contents = Contents()
    quantised: list[str] = []
    merged: set[int] = set()  # the parameters of adapted layers
    kept: set[int] = set()  # those that are written as they are
    for path, module in _each_once(root):
        kind, change = kind_of(module), changes.get(module)
        is_quantised = kind is not None and kind not in BUILT_IN
        if is_quantised:
            quantised.append(f"{path} ({type(module).__name__})")
        if kind is not None and (is_quantised or change is not None):
            contents.entries.update(_layer(path, module, kind, change))
            if not is_quantised:
                merged.update(id(p) for p in module._parameters.values() if p is not None)
            continue
        for name, tensor in _stored(module):
            full_name = _joined(path, name)
            if full_name in ours:
                continue
            if (module, name) in replaced:
                merged.add(id(tensor))
                contents.entries[full_name] = Entry(tensor.nbytes, replaced[module, name])
            elif id(tensor) not in kept:
                kept.add(id(tensor))
                contents.entries[full_name] = Entry(tensor.nbytes, tensor.detach)
    contents.is_untied = bool(merged & kept)
    contents.is_dequantised = bool(quantised)
    if quantised and not dequantise:
        raise AdapterError(
            f"{len(quantised)} layers of the base are quantised",
            details=quantised,
            expected="Merged, they are as large as unquantised ones, with the errors of their "
            "quantisation",
            fix="Load the base unquantised, and the adapter onto it with check_base=False; or give "
            "dequantise=True",
            adapter=adapter.name,
        )
    for name in getattr(root, "_keys_to_ignore_on_save", None) or ():
        contents.entries.pop(name, None)
    return contents


def _changes(
    adapter: Adapter,
) -> tuple[dict[nn.Module, LayerChange], dict[tuple[nn.Module, str], Callable[[], Tensor]]]:
    """What an adapter changes: layers by module, and whole parameters by module and name.

    Raises:
        AdapterError: parameters are replaced, and at another scale than 1 they would not be.
    """
    layers: dict[nn.Module, LayerChange] = {}
    parameters: dict[tuple[nn.Module, str], Callable[[], Tensor]] = {}
    for attachment, site, t in adapter._each():
        kind, module = attachment.layer.kind, site._module
        if isinstance(kind, ExpertStack):
            _refuse_offsets(attachment, module)
            parameters[module, kind.parameter] = partial(_experts, kind, module, attachment)
        elif kind.has_matrix:
            layers[module] = LayerChange(attachment, module)
        elif adapter.scale != 1:
            raise AdapterError(
                f"{site.path} has parameters of its own in the adapter, which are at scale "
                f"{adapter.scale:g} neither those nor the base's",
                fix="Set adapter.scale = 1",
                layer=site.path,
            )
        else:
            for name, parameter in site.parameters().items():
                if name in t:
                    own = partial(t[name].detach().to, parameter.dtype)
                    parameters[module, name] = own
    return layers, parameters


def _experts(kind: ExpertStack, module: nn.Module, attachment: Attachment) -> Tensor:
    """The weights of all experts with the adapter's change, as the parameter keeps them."""
    changed = [merged_layer(change).weight for change in changes_at(attachment, module)]
    return kind.in_layout(module, torch.stack(changed)).contiguous()


def _refuse_offsets(attachment: Attachment, module: nn.Module) -> None:
    """An error if the outputs of experts are shifted, which their weights cannot do."""
    for change in changes_at(attachment, module):
        if bool(offset_of(change).any()):
            raise AdapterError(
                f"{change.variant} shifts the outputs of {change.site.path}",
                expected="A plain stack of experts has no place for that",
                fix="Leave the experts out of this method, or the adapter in its own file",
                layer=attachment.layer.path,
            )


def _names_of_adapters(root: nn.Module) -> set[str]:
    """The names of the tensors that adapters have put on the model."""
    registry = registry_of(root)
    assert registry is not None
    names: set[str] = set()
    for state in registry.adapters.values():
        for path, attachment in state.attachments.items():
            names.add(_joined(path, attribute(state.name, RESERVED)))
            for name, key in attachment.keys.items():
                names.add(key if name in attachment.shared else _joined(path, key))
    return names


def _each_once(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its first path."""
    done: set[nn.Module] = set()
    for path, module in named_modules(root):
        if module not in done:
            done.add(module)
            yield path, module


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's own that a state dict has."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _layer(
    path: str, module: nn.Module, kind: LayerKind, change: LayerChange | None
) -> dict[str, Entry]:
    """The weight and bias of an adapted or of a quantised layer, as plain ones."""
    d_in, d_out = kind.shape(module)
    dtype = kind.dtype(module)
    read = partial(_weight, module, kind, change)
    entries = {_joined(path, "weight"): Entry(d_in * d_out * dtype.itemsize, read)}
    bias = kind.bias(module)
    plain = bias if change is None else merged_bias(change)
    if bias is None and plain is not None:
        assert change is not None
        raise AdapterError(
            f"{path} has no bias, and {change.variant} shifts its output",
            expected="A plain layer of this model has no place for that",
            layer=path,
        )
    if plain is not None:
        entries[_joined(path, "bias")] = Entry(plain.nbytes, plain.detach)
    return entries


def _weight(module: nn.Module, kind: LayerKind, change: LayerChange | None) -> Tensor:
    """A layer's plain weight, laid out as the layer stores it."""
    w = kind.weight(module).detach() if change is None else merged_layer(change).weight
    return kind.in_layout(module, w.to(kind.dtype(module)))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
