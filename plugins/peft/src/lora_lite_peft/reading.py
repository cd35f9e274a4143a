"""What the readers of PEFT's types share."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Variant, make_variant
from torch import Tensor

from lora_lite_peft.leftover import refuse_leftover

Layers = dict[str, dict[str, Tensor]]
Reader = Callable[[Path, Mapping[str, Any], Mapping[str, Tensor], Base], ForeignAdapter]


def layers_of(
    folder: Path,
    tensors: Mapping[str, Tensor],
    base: Base,
    parts: tuple[str, ...],
    needed: tuple[str, ...] | None = None,
) -> Layers:
    """The tensors of each layer, by the end of their names.

    Args:
        folder: for errors.
        tensors: of the folder.
        base: the model.
        parts: the ends that belong to the method.
        needed: those that every layer must have; None for all of them.

    Raises:
        AdapterFileError: some are missing or left over, or the model does not have their layers.
    """
    layers: Layers = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = next((part for part in parts if name.endswith(f".{part}")), None)
        if part is None:
            rest[name] = tensor
        else:
            layers.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    incomplete = list(_incomplete(layers, parts if needed is None else needed))
    if incomplete:
        raise AdapterFileError(
            f"{folder}: {len(incomplete)} layers lack some of their tensors",
            details=incomplete,
            path=str(folder),
        )
    refuse_leftover(folder, rest, base)
    base.sites(layers)
    return layers


def _incomplete(layers: Layers, parts: tuple[str, ...]) -> Iterator[str]:
    for path, found in layers.items():
        missing = [part for part in parts if part not in found]
        if missing:
            yield f"{path}: without {', '.join(missing)}"


def made(folder: Path, path: str, name: str, fields: dict[str, Any]) -> Variant:
    try:
        return make_variant(name, fields)
    except ValueError as error:
        raise AdapterFileError(f"{folder}: {path}: {error}", path=str(folder)) from None


def pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """What PEFT takes for a layer: of the first pattern found at the end of its path."""
    for expression, value in patterns.items():
        if re.match(rf"(.*\.)?({expression})$", path):
            return value
    return default


def less_one(tensor: Tensor) -> Tensor:
    """A factor as its offset from 1, in at least float32, where 1 + offset is the factor again."""
    precise = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.double() - 1).to(precise)


def refuse_dropout(folder: Path, **given: float) -> None:
    """An error for dropouts that the method here has not, and without which training differs."""
    used = [f"{name}={value}" for name, value in given.items() if value]
    if used:
        raise AdapterFileError(
            f"{folder} has {', '.join(used)}, which the method here has not",
            fix="Set it to 0 in the config to use the adapter as it is in eval mode",
            path=str(folder),
        )
