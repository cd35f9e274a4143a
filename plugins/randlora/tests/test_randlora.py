"""RandLoRA: agreement with PEFT, its rank, the published counts, and half precision."""

from __future__ import annotations

from collections.abc import Callable

import lora_lite as ll
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")


def test_agrees_with_peft(tiny_llama: Callable[..., nn.Module]) -> None:
    """With the same bases and diagonals: the same logits and gradients, for d_in below d_out, equal
    to it, and above it.
    """
    model, other = tiny_llama(), tiny_llama()
    targets = ["q_proj", "up_proj", "down_proj"]
    config = peft.RandLoraConfig(
        r=5, randlora_alpha=15, target_modules=targets, projection_prng_key=3
    )
    theirs = peft.get_peft_model(other, config).eval()
    adapter = ll.attach(model, "randlora", r=5, alpha=15.0, targets=r"(q_proj|up_proj|down_proj)$")
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "randlora_lambda")}
    state, rng = adapter.state_dict(), torch.Generator().manual_seed(1)
    bases = next(iter(layers.values()))
    a, b = bases.randlora_A["default"], bases.randlora_B["default"]
    for key in state:
        if ".A:" in key:
            state[key] = a[:, 0, : state[key].shape[1]].clone()
        elif ".B:" in key:
            rows, rank, count = state[key].shape
            state[key] = b[:rows, :count].reshape(rows, rank, count).clone()
    pairs = {}
    for key in state:
        path, _, name = key.rpartition(".")
        if not key.startswith("shared:"):
            state[key] = torch.randn(state[key].shape, generator=rng)
            pairs[key] = getattr(layers[f"base_model.model.{path}"], f"randlora_{name}")["default"]
            pairs[key].data.copy_(state[key])
    adapter.load_state_dict(state)
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    ours, expected = model(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        size = pairs[key].grad.abs().max()
        torch.testing.assert_close(parameter.grad, pairs[key].grad, rtol=0, atol=1e-5 * float(size))


@pytest.mark.parametrize("sizes", [(12, 20), (20, 12)])
def test_delta_is_the_sum_of_its_bases(sizes: tuple[int, int]) -> None:
    """y' - y = α/r Σ B_i diag(λ_i) A diag(γ_i) x, or its transpose; it is of full rank."""
    model = nn.Sequential(nn.Linear(*sizes, bias=False)).double()
    x = torch.randn(30, sizes[0], dtype=torch.float64)
    y = model(x)
    adapter = ll.attach(model, "randlora", r=5, alpha=10.0, targets="0", dtype=torch.float64)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    t = {key.rpartition(".")[2].partition(":")[0]: v for key, v in adapter.state_dict().items()}
    change = sum(
        t["B"][:, :, i] @ t["lambda"][:, i].diag() @ t["A"] @ t["gamma"][i].diag() for i in range(3)
    )
    change = change if sizes[0] < sizes[1] else change.T
    torch.testing.assert_close(model(x), y + 2 * x @ change.T, rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(change) == 12


def test_published_counts() -> None:
    """n = ⌈d / r⌉ bases of r + d numbers a layer: the paper's count."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(768, 3072) for _ in range(12)])
    found = ll.plan(model, "randlora", targets=r"\d+", r=10)
    assert found.parameters == 12 * 77 * (10 + 768)
    assert found.macs_per_token == 12 * 770 * (768 + 3072)


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("randlora")
