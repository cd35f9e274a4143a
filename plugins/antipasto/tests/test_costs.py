"""What the AntiPaSTO family costs: parameters by formula, products by torch's own count."""

from __future__ import annotations

from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_antipasto import AntiPaSTO, AntiPaSTOAblate, AntiPaSTOGain, AntiPaSTOMix
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

VARIANTS = [
    *(AntiPaSTO(r=8, rotate_basis=arm) for arm in ("V", "U", "both", "none")),
    AntiPaSTOGain(r=8),
    AntiPaSTOGain(r=8, mode="additive"),
    AntiPaSTOAblate(r=8, k=1),
    AntiPaSTOAblate(r=8, k=3),
    AntiPaSTOMix(r=8, k=3),
    AntiPaSTOMix(r=8, k=3, gain=False),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_macs_are_those_of_the_flop_counter(
    variant: Any, shape: tuple[int, int], bias: bool
) -> None:
    """Declared MACs a token are the slope of torch's FlopCounterMode between 8 and 16 tokens.

    Those a forward are products of `prepare`: E_uᵀ times the rest of K; U Ĉ and Ĉᵀ diag(S) V.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, bias=bias))
    adapter = ll.attach(model, variant, targets="0")

    def added(tokens: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as on:
            model(torch.randn(tokens, shape[0]))
        with torch.no_grad(), adapter.disabled(), FlopCounterMode(display=False) as off:
            model(torch.randn(tokens, shape[0]))
        return (on.get_total_flops() - off.get_total_flops()) // 2

    slope = (added(16) - added(8)) // 8
    assert adapter.macs_per_token == slope
    assert adapter.macs_per_forward == added(8) - 8 * slope


FROM_X = 24 * 256 * (3584 + 1024)  # V and U


def published() -> nn.ModuleList:
    """The layers of the published table, without weights: 24 x (3584 -> 1024)."""
    with torch.device("meta"):
        return nn.ModuleList(
            [nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)]
        )


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    [
        (AntiPaSTO(), 15_360, FROM_X + 24 * 256 * 4),  # r + (r / bs) bs (bs - 1) / 2 parameters
        (AntiPaSTO(rotate_basis="U"), 15_360, FROM_X + 24 * 256 * 4),
        (AntiPaSTO(rotate_basis="both"), 24 * 256 * 4, FROM_X + 24 * 256 * 4),
        (AntiPaSTO(rotate_basis="none"), 24 * 256, FROM_X),
        (AntiPaSTOGain(), 6_144, FROM_X),  # r
        (AntiPaSTOGain(mode="additive", basis="rms"), 6_144, FROM_X),
        (AntiPaSTOGain(basis="corda"), 6_144, FROM_X + 24 * 256 * 3584),
        (AntiPaSTOAblate(), 6_168, 24 * (3584 + 1024)),  # k (r + 1)
        (AntiPaSTOAblate(k=5), 24 * 5 * 257, 24 * 5 * (3584 + 1024)),
        (AntiPaSTOMix(), 104_448, FROM_X + 24 * 2 * 8 * 256),  # r + 2 r k
        (AntiPaSTOMix(gain=False), 24 * 2 * 256 * 8, FROM_X + 24 * 2 * 8 * 256),
    ],
    ids=str,
)
def test_published_counts(variant: Any, parameters: int, macs: int) -> None:
    """24 x (3584 -> 1024) at r = 256: the published parameters, and r (d_in + d_out) MACs."""
    found = ll.plan(published(), variant, targets="down_proj$")
    assert len(found.placements) == 24
    assert (found.parameters, found.macs_per_token) == (parameters, macs)


@pytest.mark.parametrize("basis", ["corda", "corda_sqrt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_v_in_two_parts_is_counted(basis: Any, dtype: torch.dtype) -> None:
    """V x takes two products where V has large entries that cancel: r (2 d_in + d_out)."""
    model = nn.Sequential(nn.Linear(24, 12)).to(dtype)
    x = torch.randn(64, 24).to(dtype)
    adapter = ll.attach(model, AntiPaSTOGain(r=8, basis=basis), targets="0", calibration=[x])
    with torch.no_grad(), FlopCounterMode(display=False) as on:
        model(x)
    with torch.no_grad(), adapter.disabled(), FlopCounterMode(display=False) as off:
        model(x)
    assert adapter.macs_per_token == 8 * (2 * 24 + 12)
    assert on.get_total_flops() - off.get_total_flops() == 2 * 64 * adapter.macs_per_token
