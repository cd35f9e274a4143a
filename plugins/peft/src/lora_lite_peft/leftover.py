"""Tensors of a folder that belong to no adapted layer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base
from torch import Tensor

EMBEDDINGS = ("lora_embedding_A", "lora_embedding_B")


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


def _same(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    there = own.get(name)
    if there is None or there.shape != tensor.shape:
        return False
    return torch.equal(there.to(tensor), tensor)


def _reason(name: str, own: Mapping[str, Tensor]) -> str:
    """What it probably is."""
    last = name.rpartition(".")[2]
    if last in EMBEDDINGS:
        return "of an embedding; adapters go to linear layers"
    if name.endswith("lora_B.bias"):
        return "a bias of the adapter's own (lora_bias)"
    if name.endswith(".bias") and name in own:
        return "a bias of the base that was trained"
    if name in own:
        return "a module of the base that was trained (modules_to_save), or another base"
    return "not known"
