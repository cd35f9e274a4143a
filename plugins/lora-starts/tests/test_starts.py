"""OLoRA, MiLoRA and CorDA: the parts that they start from, agreement with PEFT, precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_lora_starts import OLoRA
from torch import Tensor, nn

peft = pytest.importorskip("peft")


def start(variant: str, model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ on layer 0."""
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64, **options)
    state = adapter.state_dict()
    adapter.detach()
    return state["0.A0"], state["0.B0"]


@pytest.fixture
def layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 9)).double()


@pytest.mark.parametrize("equals_peft", [torch.float32], indirect=True)
def test_olora_equals_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """With A = A₀ + dA, PEFT's LoRA on its residual W - s B₀ A₀ gives our logits and gradients."""
    equals_peft(
        OLoRA(r=4, alpha=6.0),
        lambda sites: peft.LoraConfig(
            r=4, lora_alpha=6.0, target_modules=sites, init_lora_weights="olora"
        ),
        {
            "dA": theirs("lora_A.default.weight", offset="A0"),
            "dB": theirs("lora_B.default.weight", offset="B0"),
        },
    )


def test_olora_starts_from_q_and_r(layer: nn.Sequential) -> None:
    """B₀ A₀ = Q_r R_r of W's QR decomposition, whatever its signs."""
    a, b = start("olora", layer, r=4, alpha=6.0)
    q, r = torch.linalg.qr(layer[0].weight.detach())
    torch.testing.assert_close(b @ a, q[:, :4] @ r[:4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b.T @ b, torch.eye(4).double(), rtol=1e-10, atol=1e-10)


def test_milora_starts_from_the_smallest(layer: nn.Sequential) -> None:
    """What is left, W - s B₀ A₀, has the largest singular values, and r zeros."""
    a, b = start("milora", layer, r=4, alpha=6.0)
    w = layer[0].weight.detach()
    left = torch.linalg.svdvals(w - 1.5 * b @ a)
    torch.testing.assert_close(left[:5], torch.linalg.svdvals(w)[:5], rtol=1e-10, atol=1e-10)
    assert float(left[5:].max()) < 1e-10


@pytest.mark.parametrize("part", ["smallest", "largest"])
def test_corda_starts_from_what_the_data_choose(layer: nn.Sequential, part: str) -> None:
    """s B₀ A₀ = U_r S_r V_r C⁻¹ of W C, with C damped, is that part of W."""
    x = torch.randn(60, 12, dtype=torch.float64) * torch.logspace(-1, 1, 12).double()
    a, b = start("corda", layer, r=4, alpha=6.0, part=part, calibration=[x[:20], x[20:]])
    c = x.T @ x / 60
    c = c + 0.01 * c.diagonal().mean() * torch.eye(12).double()
    u, s, v = torch.linalg.svd(layer[0].weight.detach() @ c, full_matrices=False)
    chosen = slice(-4, None) if part == "smallest" else slice(4)
    expected = u[:, chosen] * s[chosen] @ v[chosen] @ torch.linalg.inv(c)
    torch.testing.assert_close(1.5 * b @ a, expected, rtol=1e-8, atol=1e-8)


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: LoRA's 3.54M parameters, and twice its MACs."""
    for name in ("corda", "milora", "olora"):
        found = ll.plan(qwen_down_proj, name, r=32)
        assert found.parameters == 3_538_944
        assert found.macs_per_token == 2 * 3_538_944


@pytest.mark.parametrize("variant", ["milora", "olora"])
def test_precision(half_precision: Callable[..., None], variant: str) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision(variant)
