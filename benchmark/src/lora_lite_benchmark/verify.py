"""A row's claims, checked: the file that it saved is what it trained, and it costs the MACs that it declares."""

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
    """Shape (rows, tokens, vocabulary); padding is zeroed, as attention to nothing is arbitrary."""
    output: Any = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
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
        raise BenchmarkError(
            f"{path}: reloaded on a fresh base, its logits differ by up to {largest:.3g}"
        )
    return True


@torch.no_grad()
def check_macs(model: nn.Module, adapter: AnyAdapter, batch: Batch) -> None:
    """Count the matrix products that the adapter adds to one short row and to two, and compare with what it declares.

    The slope is what a token takes, the intercept what a forward takes. `model` is in eval mode. Raises BenchmarkError if
    they are not the declared ones: these are columns of the table by which rows are compared.
    """
    row = batch.input_ids[:1, :COUNTED_TOKENS]
    tokens = row.numel()
    once, twice = (_added_macs(model, adapter, row.repeat(rows, 1)) for rows in (1, 2))
    counted = ((twice - once) // tokens, 2 * once - twice)
    declared = (adapter.macs_per_token, adapter.macs_per_forward)
    if counted != declared:
        raise BenchmarkError(
            f"MACs (a token, a forward): declared are {declared}, counted {counted}, from {once} for {tokens} tokens and "
            f"{twice} for {2 * tokens}"
        )


def _added_macs(model: nn.Module, adapter: AnyAdapter, input_ids: Tensor) -> int:
    with FlopCounterMode(display=False) as on:
        model(input_ids=input_ids, use_cache=False)
    with adapter.disabled(), FlopCounterMode(display=False) as off:
        model(input_ids=input_ids, use_cache=False)
    return int(on.get_total_flops() - off.get_total_flops()) // 2
