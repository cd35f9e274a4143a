"""HRA: the product of reflections, the pairing, small changes, the regulariser, and PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_hra import HRA
from torch import Tensor, nn

peft = pytest.importorskip("peft")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same reflections give PEFT's logits and gradients."""
    equals_peft(
        HRA(r=4),
        lambda sites: peft.HRAConfig(r=4, target_modules=sites),
        {"U": theirs("hra_u.default", shape=lambda u: u.T)},
    )


def reflected(x: Tensor, u: Tensor) -> Tensor:
    """H_1 ⋯ H_r x, one reflection after the other: the last acts first."""
    for row in u.flip(0):
        x = x - 2 * torch.outer(x @ row, row) / row.dot(row)
    return x


@given(
    r=st.sampled_from([2, 4, 6, 8]),
    d_in=st.integers(8, 20),
    d_out=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_delta_is_the_product_of_reflections(r: int, d_in: int, d_out: int, seed: int) -> None:
    """y' = W H_1 ⋯ H_r x + b in float64, for rows of any length."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    base, x = model[0], torch.randn(5, d_in, dtype=torch.float64)
    adapter = ll.attach(model, HRA(r=r), targets="0", dtype=torch.float64)
    (u,) = adapter.parameters()
    with torch.no_grad():
        u.copy_(torch.randn_like(u) * torch.logspace(-2, 2, r)[:, None])
    torch.testing.assert_close(
        model(x), reflected(x, u) @ base.weight.T + base.bias, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_start_is_the_identity_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    """Equal neighbours cancel, also in bfloat16: Δx is below 1e-6 of x."""
    model = nn.Sequential(nn.Linear(512, 16)).to(dtype)
    adapter = ll.attach(model, "hra", r=32, targets="0")
    (u,) = adapter.parameters()
    assert torch.equal(u[0::2], u[1::2])
    seen = []
    x = torch.randn(64, 512, dtype=dtype)
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    assert float((seen[0] - x).abs().max() / x.abs().max()) <= tolerance


def test_pair_has_opposite_gradients_at_the_start() -> None:
    """The two rows of a pair move apart at the first step."""
    model = nn.Sequential(nn.Linear(12, 7)).double()
    (u,) = ll.attach(model, "hra", r=4, targets="0", dtype=torch.float64).parameters()
    model(torch.randn(9, 12, dtype=torch.float64)).square().sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad[0::2], -u.grad[1::2])
    assert bool((u.grad.norm(dim=1) > 1e-3).all())


def test_penalty_is_the_papers_regulariser() -> None:
    """adapter.penalty() = reg Σ_sites ‖I - Û Ûᵀ‖²_F; a step on it brings it down; 0 with reg=0."""
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 12))
    adapter = ll.attach(model, "hra", r=4, reg=1e-2, targets="")
    parameters = list(adapter.parameters())
    with torch.no_grad():
        for u in parameters:
            u.normal_()
    unit = [(u / u.norm(dim=1, keepdim=True)).detach() for u in parameters]
    expected = 1e-2 * sum(((torch.eye(4) - u @ u.T) ** 2).sum() for u in unit)
    torch.testing.assert_close(adapter.penalty().detach(), expected)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        adapter.penalty().backward()
        optimizer.step()
    assert float(adapter.penalty().detach()) < 0.01 * float(expected)
    adapter.detach()
    assert float(ll.attach(model, "hra", r=4, targets="").penalty()) == 0


def test_backward_keeps_the_input_once() -> None:
    """Kept for the backward are one x, U and r-dimensional tensors, not r times x."""
    model = nn.Sequential(nn.Linear(256, 8))
    ll.attach(model, "hra", r=16, targets="0")
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    x = torch.randn(128, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(kept.values()) <= x.numel() + 4 * 128 * 16 + 4 * 16 * 256


def test_published_parameter_count(qwen_down_proj: nn.Module) -> None:
    """HRA r = 32 on 24 down_proj of a 0.8B Qwen3.5: 2.75M parameters, twice the published MACs."""
    found = ll.plan(qwen_down_proj, "hra", r=32)
    assert found.parameters == 24 * 32 * 3584 == 2_752_512
    assert found.macs_per_token == 24 * (2 * 32 * 3584 + 32**2) == 5_529_600


def test_decay_leaves_the_directions_alone() -> None:
    """Only the direction of a row counts, so weight decay is kept off all of them."""
    adapter = ll.attach(nn.Sequential(nn.Linear(12, 7)), "hra", r=4, targets="0")
    assert all(group["weight_decay"] == 0 for group in adapter.param_groups(0.1) if group["params"])


def turned(size: float, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A layer whose reflections have moved from the start by `size`; x, y and Δy in float64."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(256, 256, generator=rng) / 16)
    x = torch.randn(256, 256, generator=rng).to(dtype)
    w, y = model[0].weight.detach().double(), model(x).detach().double()
    (u,) = ll.attach(model, "hra", targets="0").parameters()
    with torch.no_grad():
        u.add_(size * torch.randn(u.shape, generator=rng))
    change = (reflected(x.double(), u.detach().double()) - x.double()) @ w.T
    return model, x, y, change


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
def test_a_small_change_is_precise_in_half_precision(
    size: float, dtype: torch.dtype, error: float
) -> None:
    """Δx is right by less than 1 % of itself, though the two rows of a pair nearly cancel."""
    model, x, _, change = turned(size, dtype)
    site = ll.plan(model, "hra", targets="0").placements[0].site
    (u,) = (p for p in model.parameters() if p.requires_grad)
    variant = HRA()
    t = {"U": u.detach()}
    found = variant.delta_input(site, {**t, **variant.prepare(site, t)}, x)
    moved = found.double() @ model[0].weight.detach().double().T
    assert float((moved - change).norm() / change.norm()) <= error


@pytest.mark.parametrize("size", [1e-2, 3e-3, 1e-3, 3e-4])
def test_a_bfloat16_layer_keeps_of_a_change_what_it_keeps_of_an_exact_one(size: float) -> None:
    """x + Δx is rounded to x's grid as y + Δy is to y's: no more is lost than of any Δy."""
    model, x, y, change = turned(size, torch.bfloat16)

    def kept(adapted: Tensor) -> float:
        return float(((adapted.double() - y) * change).sum() / change.square().sum())

    exact = (y.bfloat16() + change.bfloat16()).detach()
    assert kept(model(x).detach()) >= 0.9 * kept(exact)


@pytest.mark.parametrize(
    "field", [{"r": 3}, {"r": 0}, {"r": -2}, {"reg": -1.0}, {"reg": math.inf}, {"r": 2.0}]
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """An odd r cannot start at the base; it is refused by name, as are values out of range."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'hra': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "hra", targets="0", **field)


def test_more_reflections_than_dimensions_are_refused(untouched: Callable[..., Any]) -> None:
    """r > d_in names the site and the field, and changes nothing."""
    model = nn.Sequential(nn.Linear(6, 12))
    with (
        untouched(model),
        pytest.raises(
            ll.MisfitError, match=r"0 \(6 -> 12\): hra: r: 8 reflections are more than d_in=6"
        ),
    ):
        ll.attach(model, "hra", r=8, targets="0")
