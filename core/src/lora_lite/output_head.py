"""The output head of a model: the layer that computes the logits, which adapters leave alone."""

import re
from collections.abc import Iterable

from torch import nn

from lora_lite.find import Layer

# What it is called in models without `get_output_embeddings`.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)$")


def output_heads(found: Iterable[Layer], root: nn.Module) -> set[Layer]:
    """The layers that compute the logits: by `get_output_embeddings`, and by their usual names."""
    head = _output_embeddings(root)
    return {layer for layer in found if layer.module is head or layer.has_path_like(HEAD)}


def _output_embeddings(root: nn.Module) -> object:
    """What a model of transformers says is its output head; None if it says nothing."""
    try:
        return getattr(root, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return None  # a model without a head
