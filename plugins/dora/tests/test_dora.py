"""DoRA: the explicit weight form, the detached norm, its memory, and agreement with PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_dora import DoRA
from lora_lite_dora.dora import GROWTH
from torch import Tensor, nn

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, rslora: bool
) -> None:
    """The same A, B and m give PEFT's logits and gradients, both scalings."""
    equals_peft(
        DoRA(r=4, alpha=6.0, rslora=rslora),
        lambda sites: peft.LoraConfig(
            r=4, lora_alpha=6, use_rslora=rslora, use_dora=True, target_modules=sites
        ),
        {
            "A": theirs("lora_A.default.weight"),
            "B": theirs("lora_B.default.weight"),
            "dm": theirs("lora_magnitude_vector.default.weight", offset="n0"),
        },
    )


def attached(
    d_in: int, d_out: int, bias: bool, **fields: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float64 layer with a trained DoRA, and its tensors by name."""
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    adapter = ll.attach(model, DoRA(**fields), targets="0", dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return model, {
        name.split(".")[1]: p
        for name, p in [*adapter.named_parameters(), *adapter.state_dict().items()][::-1]
    }


@given(
    r=st.integers(1, 5),
    d_in=st.integers(5, 16),
    d_out=st.integers(5, 16),
    alpha=st.floats(0.5, 32),
    rslora=st.booleans(),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_delta_is_the_explicit_weight_form(
    r: int, d_in: int, d_out: int, alpha: float, rslora: bool, bias: bool, seed: int
) -> None:
    """y' = diag(m / n) (W + s B A) x + b, built densely; gradients too, with n held constant."""
    torch.manual_seed(seed)
    model, t = attached(d_in, d_out, bias, r=r, alpha=alpha, rslora=rslora)
    base, x, s = (
        model[0],
        torch.randn(7, d_in, dtype=torch.float64),
        alpha / (math.sqrt(r) if rslora else r),
    )
    a, b, dm = (t[name].detach().clone().requires_grad_() for name in ("A", "B", "dm"))
    w = base.weight + s * b @ a
    m = base.weight.norm(dim=1) + dm
    expected = nn.functional.linear(x, (m / w.norm(dim=1).detach())[:, None] * w, base.bias)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, twin in (("A", a), ("B", b), ("dm", dm)):
        torch.testing.assert_close(t[name].grad, twin.grad, rtol=1e-9, atol=1e-9)


def test_no_matrix_of_the_weights_size_is_kept_for_the_backward() -> None:
    """What a training step keeps, and what prepare makes, is far smaller than the weight."""
    model = nn.Sequential(nn.Linear(300, 200))
    ll.attach(model, "dora", r=4, targets="0")
    weight, largest = model[0].weight, [0]

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            largest[0] = max(largest[0], t.untyped_storage().nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(5, 300))
    assert 0 < largest[0] <= 5 * 300
    with LargestTensor() as made:
        model(torch.randn(5, 300)).sum().backward()
    assert made.numel <= 5 * 300


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every tensor that is made, views aside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_bitwise_the_base_in_every_format(base: torch.dtype, dtype: torch.dtype) -> None:
    """ρ is exactly 1 at the start, in every format; a row of zeros does no harm."""
    model = nn.Sequential(nn.Linear(24, 12)).to(base)
    with torch.no_grad():
        model[0].weight[3] = 0
    x = torch.randn(5, 24, dtype=base)
    before = model(x)
    adapter = ll.attach(model, "dora", targets="0", dtype=dtype)
    after = model(x)
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in adapter.parameters() if p.grad is not None
    )


def test_bfloat16_base_has_a_precise_norm() -> None:
    """On a bfloat16 base n / n₀ is within 2e-4 of the float64 one; bfloat16 would lose 4e-3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64)).bfloat16()
    adapter = ll.attach(model, "dora", r=8, alpha=8.0, targets="0")
    a, b, _ = adapter.parameters()
    nn.init.normal_(b, std=0.02)
    t = {name.split(".")[1]: value for name, value in adapter.state_dict().items()}
    site = ll.plan(model, "dora", targets="0").placements[0].site
    found = adapter.variant.prepare(site, t)[GROWTH]
    w = model[0].weight.double()
    exact = (w + b.double() @ a.double()).norm(dim=1) / w.norm(dim=1)
    assert float((exact - 1).detach().abs().max()) > 0.01
    torch.testing.assert_close(found.double(), exact.detach(), rtol=2e-4, atol=0)


def test_norm_is_not_computed_again_when_frozen() -> None:
    """Under frozen(), the product with W for the norm is done once, not once a token."""
    model = nn.Sequential(nn.Linear(24, 12))
    adapter = ll.attach(model, "dora", r=4, targets="0")
    counted = []
    for context in (adapter.disabled(), adapter.frozen()):
        with context, torch.no_grad():
            model(torch.randn(1, 24))
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                model(torch.randn(1, 24))
            counted.append(counter.get_total_flops() // 2)
    assert counted[1] - counted[0] == adapter.macs_per_token


def test_decay_does_not_shrink_the_magnitude() -> None:
    """param_groups keeps weight decay off dm."""
    adapter = ll.attach(nn.Sequential(nn.Linear(24, 12)), "dora", r=4, targets="0")
    decays = {
        id(p): group["weight_decay"] for group in adapter.param_groups(0.1) for p in group["params"]
    }
    assert {name: decays[id(p)] for name, p in adapter.named_parameters()} == {
        "0.A": 0.1,
        "0.B": 0.1,
        "0.dm": 0.0,
    }


def test_published_parameter_count(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: 3.56M parameters, and LoRA's 3.54M MACs a token."""
    found = ll.plan(qwen_down_proj, "dora", r=32)
    assert found.parameters == 24 * (32 * (3584 + 1024) + 1024) == 3_563_520
    assert found.macs_per_token == 3_538_944


@pytest.mark.parametrize("field", [{"r": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"rslora": 1}])
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'dora': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "dora", targets="0", **field)
