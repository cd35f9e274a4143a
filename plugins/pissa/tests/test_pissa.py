"""PiSSA: the start for any alpha and any decomposition, the untouched base, and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_pissa import PiSSA
from torch import nn

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2]])


@pytest.mark.parametrize(
    "equals_peft", [torch.float32], ids=["float32"], indirect=True
)  # theirs refuses float64
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, alpha: float | None
) -> None:
    """The same A and B give logits and gradients of PEFT's residual form, which writes its base."""
    equals_peft(
        PiSSA(r=4, alpha=alpha, svd="exact"),
        lambda sites: peft.LoraConfig(
            r=4, lora_alpha=int(alpha or 4), init_lora_weights="pissa", target_modules=sites
        ),
        {
            "dA": theirs("lora_A.default.weight", offset="A0"),
            "dB": theirs("lora_B.default.weight", offset="B0"),
        },
    )


@given(
    d_in=st.integers(6, 16),
    d_out=st.integers(6, 16),
    r=st.integers(1, 6),
    alpha=st.none() | st.floats(0.5, 64),
    svd=st.sampled_from(["exact", "randomized"]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_delta_is_the_residual_form(
    d_in: int,
    d_out: int,
    r: int,
    alpha: float | None,
    svd: Literal["exact", "randomized"],
    bias: bool,
    seed: int,
) -> None:
    """y' = (W_res + s B A) x + b with W_res = W - U diag(S) V, built densely, whatever alpha."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    base, x = model[0], torch.randn(7, d_in, dtype=torch.float64)
    u, s, v = ll.top_r_svd(base.weight.detach(), r, svd)
    adapter = ll.attach(model, PiSSA(r=r, alpha=alpha, svd=svd), targets="0", dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    t = {name.split(".")[1]: value for name, value in adapter.state_dict().items()}
    scale = 1.0 if alpha is None else alpha / r
    b_a = (t["B0"] + t["dB"]) @ (t["A0"] + t["dA"])
    expected = nn.functional.linear(x, base.weight - u @ torch.diag(s) @ v + scale * b_a, base.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "svd"), [(None, "exact"), (0.3, "randomized"), (64.0, "exact")])
def test_start_is_bitwise_the_base(
    base: torch.dtype, dtype: torch.dtype, alpha: float | None, svd: Any
) -> None:
    """Δ is bitwise 0 for every alpha, format and decomposition, and A and B have gradients."""
    model = nn.Sequential(nn.Linear(200, 120)).to(base)
    weight, x = model[0].weight.detach().clone(), torch.randn(5, 200, dtype=base)
    before = model(x)
    adapter = ll.attach(
        model, "pissa", r=4, alpha=alpha, svd=svd, dropout=0.3, targets="0", dtype=dtype
    )
    after = model.train()(x)
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    for p in adapter.parameters():
        assert p.grad is not None
        assert bool(p.grad.any())
    assert torch.equal(model[0].weight, weight)


def test_small_updates_survive_a_bfloat16_base() -> None:
    """An update far below bfloat16's resolution of A₀ counts, because offsets are kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16()
    adapter = ll.attach(model, "pissa", r=4, svd="exact", targets="0")
    t = {name.split(".")[1]: value.double() for name, value in adapter.state_dict().items()}
    for name, p in adapter.named_parameters():
        nn.init.normal_(p, std=1e-5)
        t[name.split(".")[1]] = p.detach().double()
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    site = ll.plan(model, "pissa", targets="0").placements[0].site
    stored = {name: value.bfloat16() for name, value in t.items()}
    prepared = adapter.variant.prepare(site, stored)
    found = adapter.variant.delta_output(site, {**stored, **prepared}, x, model[0](x)).double()
    expected = x.double() @ ((t["B0"] + t["dB"]) @ (t["A0"] + t["dA"]) - t["B0"] @ t["A0"]).T
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.02


def test_slim_file_derives_the_principal_part_again(
    tmp_path: Path, tiny_llama: Callable[..., nn.Module]
) -> None:
    """A file without A₀ and B₀ loads to the same logits, and is refused on another base."""
    model = tiny_llama()
    adapter = ll.attach(model, "pissa", r=4)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    trained = model(input_ids=TOKENS).logits
    adapter.save(tmp_path / "slim.safetensors", derived=False)
    adapter.detach()
    ll.load(model, tmp_path / "slim.safetensors")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, trained, rtol=1e-4, atol=1e-4)
    other = tiny_llama(initializer_range=0.3)
    with pytest.raises(ll.BaseMismatchError):
        ll.load(other, tmp_path / "slim.safetensors")


def test_costs(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: LoRA's 3.54M parameters, and twice its MACs."""
    found = ll.plan(qwen_down_proj, "pissa", r=32)
    assert found.parameters == 3_538_944
    assert found.macs_per_token == 2 * 3_538_944


@pytest.mark.parametrize("field", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"svd": "fast"}])
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'pissa': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "pissa", targets="0", **field)


def test_rank_that_does_not_fit_is_refused(untouched: Callable[..., Any]) -> None:
    """A rank above min(d_in, d_out) names site and largest possible, and changes nothing."""
    model = nn.Sequential(nn.Linear(6, 12))
    with (
        untouched(model),
        pytest.raises(ll.MisfitError, match=r"0 \(6 -> 12\): pissa: r: 8 .* largest possible is 6"),
    ):
        ll.attach(model, "pissa", targets="0")
