"""What is special to DeLoRA: the explicit form for both norms and starts, the bound, the jump, and agreement with PEFT."""

from __future__ import annotations

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
STARTS: tuple[Start, ...] = ("zero_b", "subtract")


def test_logits_and_gradients_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same A, B and λ give PEFT's logits and gradients (it has the channel norm and the start with B = 0)."""
    equals_peft(
        DeLoRA(r=4, strength=2.0),
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
    """y' = (W + term) x + b, less the initial term with start="subtract", in float64; gradients too; and the bound holds."""
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
    """After one Adam step the update of start="zero_b" has the strength that λ = 15 allows, that of "subtract" is small."""
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


def test_strength_is_learned_but_does_not_decay() -> None:
    """λ is one number of shape (1,), gets a gradient once B is not 0, and weight decay is kept off it."""
    model = nn.Sequential(nn.Linear(24, 12))
    adapter = ll.attach(model, "delora", r=4, targets="0")
    tensors = dict(adapter.named_parameters())
    nn.init.normal_(tensors["0.B"])
    model(torch.randn(5, 24)).square().sum().backward()
    assert tensors["0.lambda_offset"].shape == (1,)
    assert bool(tensors["0.lambda_offset"].grad)
    assert [p is tensors["0.lambda_offset"] for p in adapter.param_groups(0.1)[1]["params"]] == [
        True
    ]


def test_costs(qwen_down_proj: nn.Module) -> None:
    """DeLoRA r = 32 on the 24 down_proj of a 0.8B Qwen3.5 has 3.54M parameters and MACs; start="subtract" twice the MACs."""
    found, twice = (ll.plan(qwen_down_proj, "delora", r=32, start=start) for start in STARTS)
    assert found.parameters == twice.parameters == 24 * (32 * (3584 + 1024) + 1) == 3_538_968
    assert found.macs_per_token == 3_538_944 == twice.macs_per_token / 2


@pytest.mark.parametrize(
    "field", [{"strength": 0.0}, {"strength": -1.0}, {"r": 0}, {"norm": "row"}, {"start": "zero_a"}]
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value; a strength of 0 would never learn."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'delora': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "delora", targets="0", **field)
