"""What PEFT trains and saves beside an adapter: biases, and rows of tokens.

bias="all", "lora_only"       lora_bias at an adapted layer; full, only="bias", at others
trainable_token_indices       tokens; in a tied output head too
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, Variant, make_variant
from lora_lite.modules import named_modules
from torch import Tensor

ROWS = ".trainable_tokens_delta"
ADAPTER = ".token_adapter"


@dataclass(frozen=True)
class Beside:
    """What was found.

    Attributes:
        variants: by path.
        tensors: of these variants.
        biases: of layers that have an adapter as well, by path.
        rest: the tensors that are something else.
    """

    variants: Mapping[str, Variant]
    tensors: Mapping[str, Mapping[str, Tensor]]
    biases: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]


def trained_beside(
    folder: Path,
    config: Mapping[str, Any],
    rest: Mapping[str, Tensor],
    adapted: Mapping[str, object],
    base: Base,
) -> Beside:
    """The biases and rows of tokens among the tensors that belong to no adapted layer.

    Those that are as in the base are left in the rest.

    Args:
        folder: for errors.
        config: of the adapter.
        rest: these tensors.
        adapted: the layers with an adapter.
        base: the model.

    Raises:
        AdapterFileError: rows that do not go with the config.
    """
    variants: dict[str, Variant] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        path = name.removesuffix(".bias").removesuffix(".base_layer")
        if name.endswith(ROWS):
            for place, ids, rows in _rows(folder, config, name, tensor, base):
                variants[place] = make_variant("tokens", {"ids": ids})
                tensors[place] = {"rows": rows, "ids": torch.tensor(ids)}
        elif name.endswith(".bias") and _is_trained(base, path, tensor):
            if path in adapted:
                biases[path] = tensor
            else:
                variants[path] = make_variant("full", {"only": "bias"})
                tensors[path] = {"bias": tensor}
        else:
            left[name] = tensor
    both = sorted(variants.keys() & adapted.keys())
    if both:
        raise AdapterFileError(
            f"{folder} trains rows of tokens and an adapter at the same layer",
            details=both,
            expected="A layer has one method in an adapter of lora-lite",
            path=str(folder),
        )
    return Beside(variants, tensors, biases, left)


def _is_trained(base: Base, path: str, bias: Tensor) -> bool:
    """Whether a module has such a bias, with other values."""
    if path not in base.paths:
        return False
    own = base.module(path)._parameters.get("bias")
    return own is not None and own.shape == bias.shape and not torch.equal(own.to(bias), bias)


def _rows(
    folder: Path, config: Mapping[str, Any], name: str, rows: Tensor, base: Base
) -> list[tuple[str, list[int], Tensor]]:
    """Where the rows of tokens go, of which tokens, in ascending order."""
    path = name.removesuffix(ROWS).removesuffix(ADAPTER)
    ids = _ids(config, path)
    whole = [each for each in ids if isinstance(each, int) and not isinstance(each, bool)]
    if len(whole) != len(ids) or len(set(whole)) != len(rows) or len(whole) != len(rows):
        raise AdapterFileError(
            f"{folder}: {path} has {len(rows)} rows, and the config names {len(ids)} tokens",
            expected="Each row is that of one token of trainable_token_indices",
            path=str(folder),
        )
    order = sorted(range(len(whole)), key=whole.__getitem__)
    in_order = rows[torch.tensor(order)]
    return [(place, sorted(whole), in_order) for place in (path, *_tied(base, path))]


def _ids(config: Mapping[str, Any], path: str) -> list[Any]:
    """The tokens of an embedding, in the order of its rows."""
    given = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(given, Mapping):
        found = [ids for end, ids in given.items() if path == end or path.endswith(f".{end}")]
        given = found[0] if len(found) == 1 else None
    return list(given) if isinstance(given, list) else []


def _tied(base: Base, path: str) -> list[str]:
    """The output head that shares the weight of an embedding, which PEFT changes with it."""
    modules = dict(named_modules(base.root))
    weight = base.module(path)._parameters.get("weight")
    found = [
        other
        for other, module in modules.items()
        if weight is not None and module._parameters.get("weight") is weight
    ]
    return [other for other in found if modules[other] is not base.module(path)]
