"""DeLoRA: the explicit form for both norms and starts, the bound, the first steps, and PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lora_lite as ll
import pytest
import torch
from lora_lite_delora import DeLoRA
from torch import Tensor, nn

peft = pytest.importorskip("peft")

Norm = Literal["channel", "scalar"]
Start = Literal["zero_b", "subtract"]
NORMS: tuple[Norm, ...] = ("channel", "scalar")
STARTS: tuple[Start, ...] = ("subtract", "zero_b")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same A, B and λ give PEFT's logits and gradients, for what PEFT has: norm and start."""
    equals_peft(
        DeLoRA(r=4, strength=2.0, start="zero_b"),
        lambda sites: peft.DeloraConfig(r=4, delora_lambda=2, target_modules=sites),
        {
            "A": theirs("delora_A.default"),
            "B": theirs("delora_B.default"),
            "lambda_offset": theirs("delora_lambda.default", offset=2.0),
        },
    )


def term(w: Tensor, a: Tensor, b: Tensor, strength: Tensor | float, norm: Norm) -> Tensor:
    """λ/r Σ b_i a_iᵀ / (‖b_i‖ ‖a_i‖) times the norm of W, as a sum of outer products."""
    total = torch.zeros_like(w)
    for row, column in zip(a, b.T, strict=True):
        total = total + torch.outer(column / column.norm(), row / row.norm())
    return strength / len(a) * total * (w.norm(dim=0) if norm == "channel" else w.norm())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("d_in", "d_out", "bias"), [(9, 6, True), (6, 9, False)])
def test_delta_is_the_explicit_weight_form(
    norm: Norm, start: Start, d_in: int, d_out: int, bias: bool
) -> None:
    """y' = (W + term) x + b, less the initial term with start="subtract"; gradients; the bound."""
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    base, x = model[0], torch.randn(7, d_in, dtype=torch.float64)
    variant = DeLoRA(r=4, strength=1.5, norm=norm, start=start)
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    t = {
        name.split(".")[1]: value.clone().requires_grad_()
        for name, value in adapter.state_dict().items()
    }
    w, strength = base.weight.detach(), 1.5 + t["lambda_offset"]
    if start == "zero_b":
        change = term(w, t["A"], t["B"], strength, norm)
    else:
        change = term(w, t["A0"] + t["dA"], t["B0"] + t["dB"], strength, norm) - term(
            w, t["A0"], t["B0"], 1.5, norm
        )
    expected, found = nn.functional.linear(x, w + change, base.bias), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, t[name.split(".")[1]].grad, rtol=1e-9, atol=1e-9)
    if start == "zero_b":
        largest = w.norm(dim=0).max() if norm == "channel" else w.norm()
        assert float(change.norm().detach()) <= float((strength.abs() * largest).detach())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_bitwise_the_base(start: Start, base: torch.dtype, dtype: torch.dtype) -> None:
    """Δ is bitwise 0 with both starts in every format, at a strength that bfloat16 cannot hold."""
    model = nn.Sequential(nn.Linear(24, 12)).to(base)
    x = torch.randn(5, 24, dtype=base)
    before = model(x)
    adapter = ll.attach(model, "delora", r=4, strength=0.3, start=start, targets="0", dtype=dtype)
    after = model(x)
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    alive = {
        name.split(".")[1]
        for name, p in adapter.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert alive == ({"B"} if start == "zero_b" else {"dA", "dB", "lambda_offset"})


@pytest.mark.parametrize(("start", "low", "high"), [("zero_b", 0.1, 1.0), ("subtract", 0.0, 0.05)])
def test_only_zero_b_jumps_at_the_first_step(start: Start, low: float, high: float) -> None:
    """After one Adam step "zero_b" has the strength that λ allows; "subtract" is small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128))
    w = model[0].weight.detach()
    adapter = ll.attach(model, "delora", start=start, targets="0")
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-4)
    model(torch.randn(64, 256)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        change = (model(torch.eye(256)) - model[0].bias).T - w
    assert low <= float(change.norm() / w.norm()) <= high


def test_strength_is_learned() -> None:
    """λ is one number of shape (1,), with a gradient from the first step."""
    model = nn.Sequential(nn.Linear(24, 12))
    adapter = ll.attach(model, "delora", r=4, targets="0")
    tensors = dict(adapter.named_parameters())
    model(torch.randn(5, 24)).square().sum().backward()
    assert tensors["0.lambda_offset"].shape == (1,)
    assert bool(tensors["0.lambda_offset"].grad)


@pytest.mark.parametrize("start", STARTS)
def test_decay_leaves_directions_and_strength_alone(start: Start) -> None:
    """Of A and B only the directions count, and λ is the strength: weight decay is kept off all."""
    adapter = ll.attach(nn.Sequential(nn.Linear(24, 12)), "delora", start=start, targets="0")
    assert all(group["weight_decay"] == 0 for group in adapter.param_groups(0.1) if group["params"])


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
def test_a_small_change_is_precise_in_half_precision(
    size: float, dtype: torch.dtype, error: float
) -> None:
    """Δ of "subtract" is right by 1 % of itself: the two terms are not subtracted when rounded."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    x = torch.randn(32, 64).to(dtype)
    adapter = ll.attach(model, "delora", r=4, targets="0")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape))
    t = {name.partition(".")[2]: value for name, value in adapter.state_dict().items()}
    w, strength = model[0].weight.detach().double(), 15.0 + t["lambda_offset"].double()
    a0, b0 = t["A0"].double(), t["B0"].double()
    now = term(w, a0 + t["dA"], b0 + t["dB"], strength, "channel")
    change = x.double() @ (now - term(w, a0, b0, 15.0, "channel")).T
    variant, site = DeLoRA(r=4), ll.plan(model, "delora", targets="0").placements[0].site
    t = {name: value.float() for name, value in t.items()}
    found = variant.delta_output(site, {**t, **variant.prepare(site, t)}, x, model(x))
    assert float((found.double() - change).norm() / change.norm()) <= error


def first_losses(width: int, start: Start) -> list[float]:
    """Of 30 steps towards a change of 5 % of a layer's output, over the first loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    x = torch.randn(256, width)
    target = model(x).detach() + 0.05 * x @ torch.randn(width, width) / math.sqrt(width)
    adapter = ll.attach(model, "delora", start=start, targets="0")
    optimizer = torch.optim.AdamW(adapter.param_groups(0.01), lr=DeLoRA.recommended_lr)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [loss / losses[0] for loss in losses]


@pytest.mark.parametrize("width", [64, 256])
def test_the_default_start_does_not_jump(width: int) -> None:
    """The loss falls from the first step on; with B = 0 it is more than ten times as high."""
    losses = first_losses(width, DeLoRA().start)
    assert max(losses) <= 1.05
    assert losses[-1] < 0.95
    assert first_losses(width, "zero_b")[1] > 10


def test_costs(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: 3.54M parameters and MACs; twice with "subtract"."""
    twice, found = (ll.plan(qwen_down_proj, "delora", r=32, start=start) for start in STARTS)
    assert found.parameters == twice.parameters == 24 * (32 * (3584 + 1024) + 1) == 3_538_968
    assert found.macs_per_token == 3_538_944 == twice.macs_per_token / 2


@pytest.mark.parametrize(
    "field",
    [
        {"strength": 0.0},
        {"strength": -1.0},
        {"strength": math.inf},
        {"strength": 1e-320},
        {"r": 0},
        {"norm": "row"},
        {"start": "zero_a"},
    ],
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range is named; a strength of 0 would never learn."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'delora': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "delora", targets="0", **field)
