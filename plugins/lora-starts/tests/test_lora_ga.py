"""LoRA-GA: its start from the gradient of the weight, and the step that this gradient asks for."""

from __future__ import annotations

from collections.abc import Callable

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

ROWS = torch.randn(40, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 14)).double()


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return (output - batch[:, :14].sin()).square().sum()


def gradient(model: nn.Sequential) -> Tensor:
    weight = model[0].weight.detach().requires_grad_()
    value = loss(nn.functional.linear(ROWS, weight, model[0].bias), ROWS)
    (found,) = torch.autograd.grad(value, weight)
    return found


def attached(model: nn.Sequential) -> ll.Adapter:
    batches = [ROWS[:25], ROWS[25:]]
    options = {"targets": "0", "dtype": torch.float64, "calibration": batches, "loss": loss}
    return ll.attach(model, "lora_ga", r=3, gamma=4.0, **options)


def test_start_is_the_singular_directions_of_the_gradient() -> None:
    """A₀ = ζ V[:r] and B₀ = ζ U[:, r:2r] of the gradient that autograd gives, ζ = d_out^¼ / √γ."""
    model = layer()
    u, _, v = torch.linalg.svd(gradient(model), full_matrices=False)
    state = attached(model).state_dict()
    zeta = 14**0.25 / 2
    for found, expected in (
        (state["0.A0"].T @ state["0.A0"], zeta**2 * v[:3].T @ v[:3]),
        (state["0.B0"] @ state["0.B0"].T, zeta**2 * u[:, 3:6] @ u[:, 3:6].T),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_first_step_is_the_best_of_rank_2r() -> None:
    """A small step of gradient descent changes W along the best approximation of rank 2 r of its
    gradient: Theorem 3.1 of the paper."""
    model = layer()
    g = gradient(model)
    adapter = attached(model)
    loss(model(ROWS), ROWS).backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.sub_(1e-6 * parameter.grad)
    change = adapter.merged()["0"].weight - model[0].weight
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    best = (u[:, :6] * s[:6]) @ v[:6]
    cosine = torch.nn.functional.cosine_similarity(-change.flatten(), best.flatten(), dim=0)
    assert cosine > 1 - 1e-6


def test_counts(qwen_down_proj: nn.Module) -> None:
    """LoRA's parameters, and twice its multiply-accumulates."""
    found = ll.plan(qwen_down_proj, "lora_ga", r=8)
    assert found.parameters == 24 * 8 * (3584 + 1024)
    assert found.macs_per_token == 2 * found.parameters


def test_refuses_a_rank_that_leaves_no_other_directions() -> None:
    """2 r directions are needed, r for A and r for B."""
    with pytest.raises(ll.MisfitError, match=r"0 \(20 -> 14\).*2 r = 16 directions"):
        ll.attach(layer(), "lora_ga", r=8, targets="0", calibration=[ROWS], loss=loss)


def test_trains_a_language_model(tiny_llama: Callable[..., nn.Module]) -> None:
    """The model's own loss is taken where none is given."""
    model = tiny_llama()
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    batch = {"input_ids": tokens, "labels": tokens}
    before = model(**batch).loss.item()
    adapter = ll.attach(model, "lora_ga", r=4, targets=r"down_proj$", calibration=[batch])
    assert model(**batch).loss.item() == before
    optimizer = torch.optim.AdamW(adapter.param_groups(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model(**batch).loss.item() < before
