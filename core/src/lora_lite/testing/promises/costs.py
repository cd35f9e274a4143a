"""Costs: the products that a method declares are those that it computes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_lite.testing.case import Case
from lora_lite.testing.compare import NoEffectError
from lora_lite.testing.promise import promise


@promise(examples=8, sizes=True)
def macs_are_as_declared(case: Case) -> None:
    """`macs_per_token` and `macs_per_forward` are exact: the slope and the intercept, over the
    number of tokens, of the matrix products that torch's FlopCounterMode counts on an adapted layer
    beyond the base's.

    They are columns of the table by which methods are compared. Usually broken by forgetting one of
    two factors, or what `prepare` computes; a product that is made once a forward but in a delta
    belongs into `prepare`.
    """
    case = case.but(dtype=torch.float32)
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, tokens = case.sites(model)[path], 16

    def macs(count: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as adapted:
            model.layer(case.inputs(count))
        with torch.no_grad(), adapter.disabled(), FlopCounterMode(display=False) as base:
            model.layer(case.inputs(count))
        return int(adapted.get_total_flops() - base.get_total_flops()) // 2

    once, twice = macs(tokens), macs(2 * tokens)
    slope, intercept = (twice - once) / tokens, 2 * once - twice
    declared = (variant.macs_per_token(site), variant.macs_per_forward(site))
    if declared != (slope, intercept):
        # An einsum over a size of one is not counted: torch makes no matrix product of it.
        raise NoEffectError(
            f"declared (a token, a forward): {declared}; counted: {(slope, intercept)}, from "
            f"{once} MACs for {tokens} tokens and {twice} for {2 * tokens}"
        )
