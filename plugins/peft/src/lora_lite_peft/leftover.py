"""Tensors of a folder that belong to no adapted layer."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base
from lora_lite.plugins import kind_of
from torch import Tensor, nn


def refuse_leftover(folder: Path, rest: Mapping[str, Tensor], base: Base) -> None:
    """An error for tensors that are neither an adapter's nor those that the base has already.

    PEFT saves biases, whole modules and embeddings beside an adapter. Those that are equal to the
    base's say nothing, and are passed over.

    Raises:
        AdapterFileError: it names each of them.
    """
    own = base.root.state_dict()
    # PEFT keeps the layer that it adapts as `base_layer`.
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in rest.items()}
    wrong = [f"{n}: {_reason(n, own)}" for n, t in plain.items() if not _same(own, n, t)]
    if wrong:
        raise AdapterFileError(
            f"{folder} holds {len(wrong)} tensors that an adapter of lora-lite has no place for",
            details=wrong,
            expected="Passed over, they would make its outputs silently wrong",
            path=str(folder),
            tensors=[line.partition(":")[0] for line in wrong],
        )


def modules_saved(
    names: Iterable[str], rest: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The modules that PEFT has trained whole beside the adapter, and the tensors that are left.

    Args:
        names: `modules_to_save`: PEFT trains every module whose path ends so.
        rest: the tensors that belong to no adapted layer.
        base: the model.

    Returns:
        The parameters of each module that is not as in the base, by path and name, and the rest.
    """
    own = base.root.state_dict()
    there = set(base.paths)
    saved: dict[str, dict[str, Tensor]] = {}
    left = dict(rest)
    for key, tensor in rest.items():
        path, _, name = key.rpartition(".")
        if path.endswith(tuple(names)) and path in there:
            saved.setdefault(path, {})[name] = tensor
            del left[key]
    as_before = [
        path
        for path, tensors in saved.items()
        if all(_same(own, f"{path}.{name}", tensor) for name, tensor in tensors.items())
    ]
    for path in as_before:
        del saved[path]
    for path, tensors in saved.items():
        if "weight" in tensors:
            tensors["weight"] = _as_matrix(base.root.get_submodule(path), tensors["weight"])
    return saved, left


def _as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """W, (d_out, d_in), from a weight that is laid out as the module's own."""
    kind = kind_of(module)
    if kind is None:
        return weight
    twin = copy.copy(module)
    own = nn.Parameter(weight, requires_grad=False)
    twin.__dict__["_parameters"] = {**module._parameters, "weight": own}
    return kind.weight(twin).detach()


def _same(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    there = own.get(name)
    if there is None or there.shape != tensor.shape:
        return False
    return torch.equal(there.to(tensor), tensor)


def _reason(name: str, own: Mapping[str, Tensor]) -> str:
    """What it probably is."""
    if name.endswith("lora_B.bias"):
        return "a bias of the adapter's own (lora_bias)"
    if name.endswith(".bias") and name in own:
        return "a bias of the base that was trained"
    if name in own:
        return "a module of the base that was trained (modules_to_save), or another base"
    return "not known"
