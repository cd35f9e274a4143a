"""How llama.cpp's converter names and arranges the weights of a model.

An adapter's factors must be arranged as the base was. Where a converter rearranges rows and the
adapter's are not, everything runs and the outputs are wrong. So only models are here of which it is
known what their converter does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
from lora_lite import AdapterError
from torch import Tensor, nn

# From the `model_type` of transformers to llama.cpp's name.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder2": "starcoder2",
}
# Those whose query and key rows are interleaved, for another order of rotary embeddings.
INTERLEAVED = ("llama",)


@dataclass(frozen=True)
class Architecture:
    """A model as llama.cpp knows it.

    Attributes:
        name: of the architecture.
        config: of the model.
        tensor_name: the name of a weight, from the name in transformers; None if it has none.
    """

    name: str
    config: Any
    tensor_name: Callable[[str], str | None]

    def arranged(self, path: str, b: Tensor) -> Tensor:
        """B (d_out, rank) of a layer with its rows in the order of the converted weight."""
        heads = _rotated_heads(path, self.config) if self.name in INTERLEAVED else None
        return b if heads is None else interleaved(b, heads)


def interleaved(b: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, h, 1, h + 1, …, with h half the size of the head.

    transformers turns row i together with row i + h, llama.cpp neighbours.
    """
    half = len(b) // heads // 2
    return b.reshape(heads, 2, half, -1).transpose(1, 2).reshape(b.shape)


def architecture_of(root: nn.Module) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        AdapterError: it is not known here.
    """
    config: Any = getattr(root, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise AdapterError(
            f"a model of type {kind or type(root).__name__!r} cannot be written as GGUF here",
            expected="An adapter must be arranged as llama.cpp's converter arranges the base, and "
            f"that is known for {', '.join(ARCHITECTURES)}",
            fix='Write format="merged" and convert the whole checkpoint',
        )
    name = ARCHITECTURES[kind]
    numbers = {value: number for number, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[name], config.num_hidden_layers)

    def tensor_name(weight: str) -> str | None:
        found: str | None = names.get_name(weight, try_suffixes=(".weight",))
        return found

    return Architecture(name, config, tensor_name)


def _rotated_heads(path: str, config: Any) -> int | None:
    """How many heads a query or key projection has; None for other layers."""
    if path.endswith(".q_proj"):
        return int(config.num_attention_heads)
    if path.endswith(".k_proj"):
        return int(config.num_key_value_heads)
    return None
