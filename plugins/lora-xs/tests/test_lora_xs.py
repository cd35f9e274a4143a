"""LoRA-XS: the explicit weight form, the scale, half precision, counts and file size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_lora_xs import LoRAXS
from torch import nn

SIZES = st.integers(6, 24)


@given(
    d_in=SIZES,
    d_out=SIZES,
    r=st.integers(1, 6),
    alpha=st.none() | st.floats(0.5, 64),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_delta_is_the_explicit_weight_form(
    d_in: int, d_out: int, r: int, alpha: float | None, bias: bool, seed: int
) -> None:
    """y' = (W + s U R diag(S) V) x + b and its gradient, built densely, with and without bias."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    base, x = model[0], torch.randn(5, d_in, dtype=torch.float64)
    u, s, v = ll.top_r_svd(base.weight.detach(), r, "exact")
    adapter = ll.attach(
        model, LoRAXS(r=r, alpha=alpha, svd="exact"), targets="0", dtype=torch.float64
    )
    (core,) = adapter.parameters()
    nn.init.normal_(core)
    twin = core.detach().clone().requires_grad_()
    scale = 1.0 if alpha is None else alpha / r
    expected = nn.functional.linear(
        x, base.weight + scale * u @ twin @ torch.diag(s) @ v, base.bias
    )
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(core.grad, twin.grad, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("bias", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_costs_it_no_more_than_lora(bias: float, dtype: torch.dtype) -> None:
    """Δ comes from x: neither a large bias nor the rounding of y is in it. LoRA's error is 2⁻⁸."""
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 64) / 8)
        layer.bias.copy_(bias * torch.randn(32))
    model, x = nn.Sequential(layer.to(dtype)), torch.randn(64, 64).to(dtype)
    variant = LoRAXS(r=16)
    site = ll.plan(model, variant, targets="0").placements[0].site
    t = {**variant.derive(site), "R": torch.randn(16, 16)}
    exact = x.double() @ (t["B"].double() @ t["R"].double() @ t["A"].double()).T
    rounded = {name: value.to(dtype) for name, value in t.items()}
    found = variant.delta_output(site, rounded, x, model(x)).double()
    unit = torch.finfo(dtype).eps
    assert float((found - exact).norm() / exact.norm()) <= unit


def test_files_of_the_first_format() -> None:
    """One that holds A is read on; one without says what to do."""
    saved = {"B": torch.ones(4, 2), "R": torch.ones(2, 2)}
    with_a = {**saved, "A": torch.ones(2, 3)}
    assert LoRAXS.upgrade({"r": 2}, with_a, 1) == ({"r": 2}, with_a)
    with pytest.raises(ll.AdapterFileError, match=r"in format 1, without the frozen factor A"):
        LoRAXS.upgrade({"r": 2}, saved, 1)


def test_all_linear_layers_of_a_transformer(tiny_llama: Callable[..., nn.Module]) -> None:
    """Without targets it goes to every projection, starts as the base, and learns everywhere."""
    model = tiny_llama()
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    before = model(input_ids=tokens).logits
    adapter = ll.attach(model, "lora_xs", r=4)
    assert len(adapter.sites) == 14
    assert torch.equal(model(input_ids=tokens).logits, before)
    ll.check(model, {"input_ids": tokens})


def test_slim_file_holds_little_but_the_cores(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module]
) -> None:
    """A file without derived tensors has r² numbers a site, and loads to the same logits."""
    model, tokens = tiny_llama(), torch.tensor([[5, 9, 3, 7, 1, 2]])
    adapter = ll.attach(model, "lora_xs", r=4)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    trained = model(input_ids=tokens).logits
    adapter.save(tmp_path / "slim.safetensors", derived=False)
    assert sum(t.numel() for t in adapter.state_dict(derived=False).values()) == 14 * 16
    adapter.detach()
    ll.load(model, tmp_path / "slim.safetensors")
    torch.testing.assert_close(model(input_ids=tokens).logits, trained, rtol=1e-4, atol=1e-4)


def test_published_parameter_count(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: the published 0.025M parameters and 3.56M MACs."""
    found = ll.plan(qwen_down_proj, "lora_xs", r=32)
    assert found.parameters == 24 * 32**2 == 24_576
    assert found.macs_per_token == 24 * (32 * (3584 + 1024) + 32**2) == 3_563_520


@pytest.mark.parametrize(
    "field", [{"r": 0}, {"alpha": 0.0}, {"alpha": 1e-320}, {"alpha": "8"}, {"svd": "fast"}]
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'lora_xs': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "lora_xs", targets="0", **field)


def test_default_rank_that_does_not_fit_is_refused(untouched: Callable[..., Any]) -> None:
    """A rank above min(d_in, d_out) names site and largest possible, and changes nothing."""
    model = nn.Sequential(nn.Linear(6, 12))
    with (
        untouched(model),
        pytest.raises(
            ll.MisfitError, match=r"0 \(6 -> 12\): lora_xs: r: 32 .* largest possible is 6"
        ),
    ):
        ll.attach(model, "lora_xs", targets="0")
