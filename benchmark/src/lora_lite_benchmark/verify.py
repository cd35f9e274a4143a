"""A row's claims, checked: the saved file is the trained adapter, and the MACs are as declared."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.variants import AnyAdapter, load_adapter

__all__ = ["check_macs", "logits", "reload_agrees"]

COUNTED_TOKENS = 16


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of shape (rows, tokens, vocabulary). Those at padding mean nothing and are set
    to zero.
    """
    output: Any = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    masked: Tensor = output.logits * batch.attention_mask[..., None]
    return masked


def reload_agrees(config: RunConfig, path: Path, batch: Batch, expected: Tensor) -> bool:
    """Whether the file at `path`, on a fresh base, gives exactly the `expected` logits for `batch`.

    Raises BenchmarkError if it does not: an adapter that cannot be loaded again has no place in a
    table.
    """
    model = load_model(config, batch.input_ids.device)
    load_adapter(model, config, path)
    found = logits(model, batch)
    if not torch.equal(found, expected):
        largest = float((found - expected).abs().max())
        raise BenchmarkError(
            f"{path}, loaded on a fresh base, gives logits that differ by up to {largest:.3g} "
            "from those of the trained model",
            expected="They must be the same bits",
        )
    return True


@torch.no_grad()
def check_macs(model: nn.Module, adapter: AnyAdapter, batch: Batch) -> None:
    """Compare the MACs that the adapter declares with those counted, as both are columns of the
    table by which rows are compared.

    MACs are the multiply-accumulates of matrix products. They are counted for one short row and for
    two: the slope is what a token takes, the intercept what a forward takes. `model` must be in
    eval mode.

    Raises BenchmarkError if they are not the declared ones.
    """
    row = batch.input_ids[:1, :COUNTED_TOKENS]
    tokens = row.numel()
    once = _added_macs(model, adapter, row)
    twice = _added_macs(model, adapter, row.repeat(2, 1))
    per_token = (twice - once) // tokens
    per_forward = 2 * once - twice
    if (per_token, per_forward) != (adapter.macs_per_token, adapter.macs_per_forward):
        raise BenchmarkError(
            f"the adapter adds {per_token:,} MACs for each token and {per_forward:,} for each "
            f"forward, counted from {once:,} for {tokens} tokens and {twice:,} for {2 * tokens}",
            expected=f"It declares {adapter.macs_per_token:,} for each token and "
            f"{adapter.macs_per_forward:,} for each forward",
        )


def _added_macs(model: nn.Module, adapter: AnyAdapter, input_ids: Tensor) -> int:
    """The MACs of a forward with the adapter minus those of one without it."""
    with FlopCounterMode(display=False) as with_adapter:
        model(input_ids=input_ids, use_cache=False)
    with adapter.disabled(), FlopCounterMode(display=False) as without_adapter:
        model(input_ids=input_ids, use_cache=False)
    added_flops = with_adapter.get_total_flops() - without_adapter.get_total_flops()
    # A multiply-accumulate is counted as two operations.
    return int(added_flops) // 2
