"""FourierFT: its sum of waves in float64, the published counts, and half precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import lora_lite as ll
import torch
from lora_lite_fourierft import FourierFT
from torch import nn


def test_delta_is_a_sum_of_waves() -> None:
    """y' - y = ΔW x with ΔW_jk = α / (d_in d_out) Σ c cos 2π(p j / d_out + q k / d_in)."""
    model = nn.Sequential(nn.Linear(12, 7)).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    adapter = ll.attach(model, FourierFT(n=20, alpha=30.0), targets="0", dtype=torch.float64)
    (c,) = adapter.parameters()
    nn.init.normal_(c)
    places = adapter.state_dict()["0.frequencies"]
    assert len(places.unique()) == len(c) == 20
    j, k = torch.arange(7).double()[:, None], torch.arange(12).double()[None]
    change = torch.zeros(7, 12, dtype=torch.float64)
    for value, place in zip(c.tolist(), places.tolist(), strict=True):
        p, q = divmod(place, 12)
        change += 30 / (12 * 7) * value * torch.cos(2 * math.pi * (p * j / 7 + q * k / 12))
    torch.testing.assert_close(model(x), y + x @ change.T, rtol=1e-10, atol=1e-10)


def test_published_counts() -> None:
    """RoBERTa-base: n = 1000 on the 24 query and value layers is 0.024M, as the paper counts."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(768, 768) for _ in range(24)])
    found = ll.plan(model, "fourierft", targets=r"\d+", n=1000)
    assert found.parameters == 24_000
    assert found.macs_per_token == 24 * 768**2


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("fourierft")
