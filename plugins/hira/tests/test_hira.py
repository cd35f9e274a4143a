"""HiRA: agreement with PEFT, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
from lora_lite_hira import HiRA
from torch import nn

peft = pytest.importorskip("peft")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same A and B give PEFT's logits and gradients."""
    equals_peft(
        HiRA(r=4),
        lambda sites: peft.HiraConfig(r=4, target_modules=sites),
        {"A": theirs("hira_A.default"), "B": theirs("hira_B.default")},
        noise=1.0,
    )


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: LoRA's parameters, and the base's MACs a token."""
    found = ll.plan(qwen_down_proj, "hira", r=32)
    assert found.parameters == 24 * 32 * (3584 + 1024) == 3_538_944
    assert found.macs_per_token == 24 * 3584 * 1024
    assert found.macs_per_forward == 32 * found.macs_per_token


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("hira")
