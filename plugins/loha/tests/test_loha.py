"""LoHa: agreement with PEFT, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
from lora_lite_loha import LoHa
from torch import nn

peft = pytest.importorskip("peft")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same factors give PEFT's logits and gradients, at a scale that is not 1."""
    equals_peft(
        LoHa(r=4, alpha=6.0),
        lambda sites: peft.LoHaConfig(r=4, alpha=6.0, target_modules=sites),
        {
            "A1": theirs("hada_w1_b.default"),
            "B1": theirs("hada_w1_a.default"),
            "A2": theirs("hada_w2_b.default"),
            "B2": theirs("hada_w2_a.default"),
        },
        noise=0.5,
    )


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: the parameters of a LoRA of twice the rank."""
    found = ll.plan(qwen_down_proj, "loha", r=16)
    assert found.parameters == 24 * 2 * 16 * (3584 + 1024) == 3_538_944
    assert found.macs_per_token == 24 * 3584 * 1024
    assert found.macs_per_forward == 2 * 16 * found.macs_per_token


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("loha")
