"""OFT: agreement with PEFT, orthogonality, the counts, and small changes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_oft import OFT
from torch import nn

peft = pytest.importorskip("peft")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same skew matrices give the logits and gradients of PEFT's exact Cayley transform."""
    equals_peft(
        OFT(block_size=8),
        lambda sites: peft.OFTConfig(
            r=0, oft_block_size=8, target_modules=sites, use_cayley_neumann=False
        ),
        {"Q": theirs("oft_R.default.weight")},
    )


def test_lengths_are_kept() -> None:
    """However far Q is from 0, the layer's input keeps its length: x' = Rᵀ x is a turn."""
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).double()
    nn.init.eye_(model[0].weight)
    (q,) = ll.attach(model, "oft", block_size=8, targets="0", dtype=torch.float64).parameters()
    nn.init.normal_(q, std=10)
    x = torch.randn(9, 24, dtype=torch.float64)
    turned = model(x).detach()
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=1e-10)
    assert float((turned - x).norm() / x.norm()) > 0.1


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: d_in (b - 1) / 2 parameters, d_in b MACs a token."""
    found = ll.plan(qwen_down_proj, "oft", block_size=32)
    assert found.parameters == 24 * 3584 * 31 // 2
    assert found.macs_per_token == 24 * 3584 * 32


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_a_small_turn_is_precise_in_half_precision(dtype: torch.dtype, error: float) -> None:
    """Δx is right to the rounding of its own size, since R - I is not a difference."""
    site = ll.plan(nn.Sequential(nn.Linear(64, 8).to(dtype)), "oft", targets="0").placements[0].site
    variant = OFT(block_size=16)
    x, q = torch.randn(50, 64).to(dtype), 1e-3 * torch.randn(4, 120)
    found, exact = (
        variant.delta_input(site, variant.prepare(site, {"Q": values}), inputs).double()
        for values, inputs in ((q, x), (q.double(), x.double()))
    )
    assert float((found - exact).norm() / exact.norm()) < error
