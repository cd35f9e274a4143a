"""VeRA: agreement with PEFT, the published counts, files without the random matrices, and half
precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")


def test_agrees_with_peft(tiny_llama: Callable[..., nn.Module]) -> None:
    """With the same A, B, d and b: the same logits and gradients, on layers of two shapes."""
    targets = ["q_proj", "down_proj"]
    model, other = tiny_llama(), tiny_llama()
    config = peft.VeraConfig(r=6, target_modules=targets, projection_prng_key=3)
    theirs = peft.get_peft_model(other, config).eval()
    adapter = ll.attach(model, "vera", r=6, targets=r"(q_proj|down_proj)$")
    state = adapter.state_dict()
    projections = next(m for m in theirs.modules() if hasattr(m, "vera_lambda_b"))
    a, b = projections.vera_A["default"], projections.vera_B["default"]
    for key in state:
        if key.startswith("shared:"):
            rows, columns = state[key].shape
            state[key] = (a if ".A:" in key else b)[:rows, :columns].clone()
    named = dict(theirs.named_parameters())
    rng = torch.Generator().manual_seed(1)
    pairs = {}
    for key in state:
        path, _, name = key.rpartition(".")
        if not key.startswith("shared:"):
            state[key] = torch.randn(state[key].shape, generator=rng)
            pairs[key] = named[f"base_model.model.{path}.vera_lambda_{name}.default"]
            pairs[key].data.copy_(state[key])
    adapter.load_state_dict(state)
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    ours, expected = model(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        size = pairs[key].grad.abs().max()
        torch.testing.assert_close(parameter.grad, pairs[key].grad, rtol=0, atol=1e-5 * float(size))


def test_published_counts() -> None:
    """RoBERTa-base: r = 1024 on the 24 query and value layers is 0.043M, as the paper counts."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(768, 768) for _ in range(24)])
    found = ll.plan(model, "vera", targets=r"\d+", r=1024)
    assert found.parameters == 24 * (768 + 1024) == 43_008
    assert found.macs_per_token == 24 * 1024 * (768 + 768)


def test_slim_file_holds_the_vectors_alone(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """A file without derived tensors leaves A and B out, and gives the same logits."""
    model = tiny_llama()
    adapter = ll.attach(model, "vera", r=64, targets=r"down_proj$")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    adapter.save(tmp_path / "full")
    adapter.save(tmp_path / "slim", derived=False)
    assert set(adapter.state_dict(derived=False)) == {n for n, _ in adapter.named_parameters()}
    assert (tmp_path / "slim").stat().st_size < (tmp_path / "full").stat().st_size / 2
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    again = tiny_llama()
    ll.load(again, tmp_path / "slim")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("vera")
