"""C3A: agreement with PEFT, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_c3a import C3A
from torch import nn

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("equals_peft", [torch.float32], indirect=True)
def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same kernel gives the logits and gradients of PEFT's Fourier transforms, in float32.

    On one layer alone: PEFT's gradient by the layer's input is wrong, so kernels of layers below
    another adapted one get other gradients there.
    """
    equals_peft(
        C3A(block_size=8),
        lambda sites: peft.C3AConfig(block_size=8, target_modules=sites),
        {"w": theirs("c3a_kernel.default")},
        noise=2.0,
        targets=r"layers\.1\.mlp\.down_proj$",
    )


def test_delta_is_a_circular_convolution() -> None:
    """Δy_k = 1 / d_in Σ w_{(l - k) mod b} x_l, summed over the blocks of x, in float64."""
    model = nn.Sequential(nn.Linear(12, 8)).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    adapter = ll.attach(model, C3A(block_size=4), targets="0", dtype=torch.float64)
    (w,) = adapter.parameters()
    nn.init.normal_(w)
    change = torch.zeros(8, 12, dtype=torch.float64)
    for row in range(8):
        for column in range(12):
            change[row, column] = w[row // 4, column // 4, (column - row) % 4].detach() / 12
    torch.testing.assert_close(model(x), y + x @ change.T, rtol=1e-10, atol=1e-10)


def test_a_block_divides_both_sides() -> None:
    """b is the largest common divisor up to block_size: 4 for 12 -> 20, however large the field."""
    model = nn.Sequential(nn.Linear(12, 20))
    assert ll.plan(model, "c3a", targets="0").parameters == 12 * 20 / 4
    assert ll.plan(model, "c3a", targets="0", block_size=3).parameters == 12 * 20 / 2


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: d_in d_out / b parameters, the base's MACs a token."""
    found = ll.plan(qwen_down_proj, "c3a", block_size=512)
    assert found.parameters == 24 * 3584 * 1024 // 512 == 172_032
    assert found.macs_per_token == 24 * 3584 * 1024


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("c3a")
