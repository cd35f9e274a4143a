"""What the tests of this plugin share: small models with experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
}


@pytest.fixture
def mixture() -> Callable[..., nn.Module]:
    """Makes a model with experts of a family, the same every time, with no weight at its start."""

    def make(family: str, width: int = 12) -> nn.Module:
        import transformers as tf

        torch.manual_seed(0)
        if family == "qwen3":
            counts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
            sizes = {**SIZES, "moe_intermediate_size": width, **counts}
            model: nn.Module = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes))
        elif family == "mixtral":
            model = tf.MixtralForCausalLM(tf.MixtralConfig(**{**SIZES, "num_local_experts": 4}))
        else:
            sizes = {**SIZES, "num_local_experts": 4, "intermediate_size": width}
            model = tf.GptOssForCausalLM(tf.GptOssConfig(**sizes))
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        return model.eval()

    return make
