"""LoKr: agreement with PEFT, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
from lora_lite_lokr import LoKr
from lora_lite_lokr.lokr import first_factor
from torch import nn

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("r", [2, 8])
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, r: int
) -> None:
    """The same factors give PEFT's logits and gradients, with W₂ of rank 2 and whole."""
    large = {"A": theirs("lokr_w2_b.default"), "B": theirs("lokr_w2_a.default")}
    whole = {"W2": theirs("lokr_w2.default")}
    equals_peft(
        LoKr(r=r, alpha=6.0, factor=2),
        lambda sites: peft.LoKrConfig(r=r, alpha=6.0, decompose_factor=2, target_modules=sites),
        {"W1": theirs("lokr_w1.default"), **(large if r == 2 else whole)},
    )


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(3584, 16, 16), (1024, 5, 4), (127, 16, 1), (36, 100, 6)]
)
def test_first_factor(size: int, limit: int, expected: int) -> None:
    """The largest divisor up to the limit and the root."""
    assert first_factor(size, limit) == expected


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: W₁ is 16 × 16, W₂ = B A is 64 × 224 of rank 8."""
    found = ll.plan(qwen_down_proj, "lokr")
    assert found.parameters == 24 * (16 * 16 + 8 * (64 + 224))
    assert found.macs_per_token == 24 * 3584 * 1024
    assert found.macs_per_forward == 24 * 8 * 64 * 224


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("lokr")
