"""The saved file is the trained adapter: loaded onto a fresh base, it gives the same logits, bit for bit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.variants import load_adapter

__all__ = ["logits", "reload_agrees"]


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Shape (rows, tokens, vocabulary); padding is zeroed, as attention to nothing is arbitrary."""
    output: Any = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    masked: Tensor = output.logits * batch.attention_mask[..., None]
    return masked


def reload_agrees(config: RunConfig, path: Path, batch: Batch, expected: Tensor) -> bool:
    """Whether `path`, on a fresh base, gives exactly `expected` for `batch`.

    Raises BenchmarkError if it does not: an adapter that cannot be loaded again has no place in a table.
    """
    model = load_model(config, batch.input_ids.device)
    load_adapter(model, config, path)
    found = logits(model, batch)
    if not torch.equal(found, expected):
        largest = float((found - expected).abs().max())
        raise BenchmarkError(f"{path}: reloaded on a fresh base, its logits differ by up to {largest:.3g}")
    return True
