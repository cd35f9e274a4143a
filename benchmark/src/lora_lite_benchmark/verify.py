"""A row's claims, checked: the saved file is the trained adapter, and the MACs are as declared."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.setup import fresh_base
from lora_lite_benchmark.sharded import shard
from lora_lite_benchmark.variants import AnyAdapter, load_adapter

__all__ = ["Macs", "check_macs", "logits", "reload_agrees"]

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


def reload_agrees(
    config: RunConfig, path: Path, batch: Batch, expected: Tensor, accelerator: Accelerator
) -> bool:
    """Whether the file at `path`, on a fresh base, gives exactly the `expected` logits for `batch`.

    Raises BenchmarkError if it does not: an adapter that cannot be loaded again has no place in a
    table.
    """
    model = fresh_base(config, accelerator)
    load_adapter(model, config, path)
    shard(model, accelerator)
    found = logits(model, batch)
    if not torch.equal(found, expected):
        largest = float((found - expected).abs().max())
        raise BenchmarkError(
            f"{path}, loaded on a fresh base, gives logits that differ by up to {largest:.3g} "
            "from those of the trained model",
            expected="They must be the same bits",
        )
    return True


class Macs(NamedTuple):
    """The multiply-accumulates of matrix products that an adapter adds to those of its base."""

    per_token: int
    per_forward: int


def check_macs(model: nn.Module, adapter: AnyAdapter, batch: Batch) -> Macs:
    """Count the MACs, and compare them with those that the adapter declares, if it declares any:
    rows are compared by them. `model` must be in eval mode.

    Raises BenchmarkError if they are not the declared ones.
    """
    counted = _count_macs(model, adapter, batch.input_ids[:1, :COUNTED_TOKENS])
    if adapter.macs_per_token is None or adapter.macs_per_forward is None:
        return counted
    declared = Macs(adapter.macs_per_token, adapter.macs_per_forward)
    if counted != declared:
        raise BenchmarkError(
            f"the adapter adds {counted.per_token:,} MACs for each token and "
            f"{counted.per_forward:,} for each forward",
            expected=f"It declares {declared.per_token:,} for each token and "
            f"{declared.per_forward:,} for each forward",
        )
    return counted


@torch.no_grad()
def _count_macs(model: nn.Module, adapter: AnyAdapter, row: Tensor) -> Macs:
    """Counted for one short row and for two: the slope is what a token takes, the intercept what a
    forward takes.
    """
    tokens = row.numel()
    once = _added_macs(model, adapter, row)
    twice = _added_macs(model, adapter, row.repeat(2, 1))
    return Macs(per_token=(twice - once) // tokens, per_forward=2 * once - twice)


def _added_macs(model: nn.Module, adapter: AnyAdapter, input_ids: Tensor) -> int:
    """The MACs of a forward with the adapter minus those of one without it."""
    with FlopCounterMode(display=False) as with_adapter:
        model(input_ids=input_ids, use_cache=False)
    with adapter.disabled(), FlopCounterMode(display=False) as without_adapter:
        model(input_ids=input_ids, use_cache=False)
    added_flops = with_adapter.get_total_flops() - without_adapter.get_total_flops()
    # A multiply-accumulate is counted as two operations.
    return int(added_flops) // 2
