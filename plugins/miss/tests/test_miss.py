"""MiSS: agreement with PEFT, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
from lora_lite_miss import MiSS
from torch import nn

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("r", [4, 5])
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, r: int
) -> None:
    """The same D gives PEFT's logits and gradients, also where r does not divide d_in."""
    equals_peft(
        MiSS(r=r),
        lambda sites: peft.MissConfig(r=r, target_modules=sites),
        {"D": theirs("miss_block.default", shape=lambda d: d.T)},
    )


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: r d_out parameters, LoRA's MACs."""
    found = ll.plan(qwen_down_proj, "miss", r=64)
    assert found.parameters == 24 * 64 * 1024 == 1_572_864
    assert found.macs_per_token == 24 * 64 * (3584 + 1024)


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("miss")
