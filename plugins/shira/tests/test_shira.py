"""SHiRA: the sparse change in float64, its places, the counts, and half precision."""

from __future__ import annotations

from collections.abc import Callable

import lora_lite as ll
import torch
from lora_lite_shira import SHiRA
from torch import nn


def test_delta_is_the_sparse_matrix() -> None:
    """y' - y = ΔW x with v at its places and 0 elsewhere, in float64."""
    model = nn.Sequential(nn.Linear(12, 7)).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    adapter = ll.attach(model, SHiRA(r=2), targets="0", dtype=torch.float64)
    (v,) = adapter.parameters()
    nn.init.normal_(v)
    places = adapter.state_dict()["0.places"]
    assert len(places.unique()) == len(v) == 2 * (12 + 7)
    indices = torch.stack([places // 12, places % 12])
    change = torch.sparse_coo_tensor(indices, v.detach(), (7, 12), check_invariants=True).to_dense()
    torch.testing.assert_close(model(x), y + x @ change.T, rtol=1e-10, atol=1e-10)


def test_places_are_the_seeds() -> None:
    """Another seed chooses other entries, and the same the same."""

    def places(seed: int) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(64, 64))
        adapter = ll.attach(model, "shira", r=4, targets="0", seed=seed)
        return adapter.state_dict()["0.places"]

    assert torch.equal(places(0), places(0))
    assert not torch.equal(places(0), places(1))


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: LoRA's parameters, the base's MACs a token."""
    found = ll.plan(qwen_down_proj, "shira", r=32)
    assert found.parameters == 24 * 32 * (3584 + 1024) == 3_538_944
    assert found.macs_per_token == 24 * 3584 * 1024


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("shira", r=2)
