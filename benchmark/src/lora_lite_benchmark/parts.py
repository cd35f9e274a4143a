"""The rows that train a part of the model as it is: its norms, or its output head.

    norms    the weights of every normalisation
    head     the output head; one that is tied to the embedding gets weights of its own

They are the variant `full` of lora-lite on these layers. A low-rank method has to be worth more.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_lite_benchmark.errors import BenchmarkError

__all__ = ["PARTS", "layers_of", "library_variant"]


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "Norm" in type(module).__name__]


def _head(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


PARTS: dict[str, Callable[[nn.Module], list[str]]] = {"norms": _norms, "head": _head}
"""For each of these rows, how the paths of its layers are found."""


def library_variant(row: str) -> str:
    """The variant of lora-lite that a row's variant stands for: `norms` is `full` on some layers,
    and every other one is itself.
    """
    return "full" if row in PARTS else row


def layers_of(part: str, model: nn.Module) -> dict[str, Any]:
    """The layers of a part, as arguments of `ll.plan` and `ll.attach`.

    Raises:
        BenchmarkError: the model has no such part.
    """
    paths = PARTS[part](model)
    if not paths:
        raise BenchmarkError(
            f"the row {part!r} was asked for, and {type(model).__name__} has no {part}",
            fix=f"Leave out the row {part!r}",
        )
    # The row's own layers are others, and by default attach leaves out the output head.
    targets = [f"^{re.escape(path)}$" for path in paths]
    return {"targets": targets, "exclude": (), "layers": None}
