"""What the AntiPaSTO family costs: parameters by formula, multiply-accumulates by torch's own count."""

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
    """Declared MACs a token are the slope of torch's FlopCounterMode between 8 and 16 tokens, and those a forward are products
    of `prepare`: b U or b O, the product of two rotations, and U Ĉ.
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


def published() -> nn.ModuleList:
    """The layers of the published table, without weights: 24 x (3584 -> 1024)."""
    with torch.device("meta"):
        return nn.ModuleList(
            [nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)]
        )


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    [
        (
            AntiPaSTO(),
            15_360,
            24 * (2 * 256 * 1024 + 256 * 4),
        ),  # r + (r / bs) bs (bs - 1) / 2 parameters
        (AntiPaSTO(rotate_basis="U"), 15_360, 24 * (2 * 256 * 1024 + 256 * 4)),
        (AntiPaSTO(rotate_basis="both"), 24 * 256 * 4, 24 * (2 * 256 * 1024 + 256 * 4)),
        (AntiPaSTO(rotate_basis="none"), 24 * 256, 24 * 2 * 256 * 1024),
        (AntiPaSTOGain(), 6_144, 24 * 2 * 256 * 1024),  # r
        (AntiPaSTOGain(mode="additive", basis="corda"), 6_144, 24 * 2 * 256 * 1024),
        (AntiPaSTOAblate(), 6_168, 24 * 2 * 1024),  # k (r + 1)
        (AntiPaSTOAblate(k=5), 24 * 5 * 257, 24 * 2 * 5 * 1024),
        (AntiPaSTOMix(), 104_448, 24 * (2 * 256 * 1024 + 2 * 8 * 256)),  # r + 2 r k
        (AntiPaSTOMix(gain=False), 24 * 2 * 256 * 8, 24 * (2 * 256 * 1024 + 2 * 8 * 256)),
    ],
    ids=str,
)
def test_published_counts(variant: Any, parameters: int, macs: int) -> None:
    """24 x (3584 -> 1024) at r = 256: the published numbers of parameters, and the MACs of computing from y."""
    found = ll.plan(published(), variant, targets="down_proj$")
    assert len(found.placements) == 24
    assert (found.parameters, found.macs_per_token) == (parameters, macs)


def test_wide_layers_are_computed_from_x() -> None:
    """1024 -> 3584: r (d_in + d_out) where that is less than 2 r d_out. Ablation needs 2 k d_out in any case."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(1024, 3584)})])
    assert ll.plan(model, "antipasto_gain").macs_per_token == 256 * (1024 + 3584)
    assert ll.plan(model, "antipasto_ablate").macs_per_token == 2 * 3584
