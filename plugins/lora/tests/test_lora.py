"""LoRA: the formula, its scaling, dropout, the published counts, and agreement with PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_lora import LoRA
from torch import Tensor, nn

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def fill_like_peft(
    adapter: ll.Adapter, theirs: nn.Module
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Draw A and B, give both libraries the same, and pair our parameters with theirs."""
    named = dict(theirs.named_parameters())
    rng = torch.Generator().manual_seed(1)
    for name, ours in adapter.named_parameters():
        path, tensor = name.rsplit(".", 1)
        other = named[f"base_model.model.{path}.lora_{tensor}.default.weight"]
        with torch.no_grad():
            ours.copy_(torch.randn(ours.shape, generator=rng) / 4)
            other.copy_(ours)
        yield ours, other


@pytest.mark.parametrize(
    ("dtype", "r", "alpha", "tolerance"),
    [
        (torch.float32, 4, 8, 1e-6),
        (
            torch.float64,
            3,
            7,
            1e-12,
        ),  # a scale that float32 would round at another place than PEFT does
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", r"q_proj$|down_proj$"), ("biased llama", "_proj$"), ("gpt2", "c_")],
)
def test_logits_and_gradients_equal_pefts(
    tiny_llama: Callable[..., nn.Module],
    tiny_gpt2: Callable[..., nn.Module],
    family: str,
    targets: str,
    rslora: bool,
    dtype: torch.dtype,
    r: int,
    alpha: int,
    tolerance: float,
) -> None:
    """The same A and B give PEFT's logits and gradients, on nn.Linear and Conv1D, both scalings."""

    def make() -> nn.Module:
        biased = {"attention_bias": "biased" in family, "mlp_bias": "biased" in family}
        return (tiny_gpt2() if family == "gpt2" else tiny_llama(**biased)).to(dtype)

    ours, base = make(), make()
    adapter = ll.attach(
        ours, "lora", r=r, alpha=float(alpha), rslora=rslora, targets=targets, dtype=dtype
    )
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=list(adapter.sites),
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(base, config).to(dtype)
    pairs = list(fill_like_peft(adapter, theirs))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    losses = []
    for model in (ours, theirs):
        output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        losses.append(output.logits)
    untrained = make()(input_ids=TOKENS).logits
    assert relative(untrained, losses[0]) > 1e-2  # the adapter does something
    assert relative(losses[0], losses[1]) <= tolerance
    for mine, other in pairs:
        assert mine.grad is not None
        assert other.grad is not None
        assert relative(mine.grad, other.grad) <= tolerance


@given(
    r=st.integers(1, 6),
    d_in=st.integers(6, 20),
    d_out=st.integers(6, 20),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_delta_is_the_formula(r: int, d_in: int, d_out: int, alpha: float, rslora: bool) -> None:
    """y' - y = s B A x with s = alpha / r, or alpha / √r with rslora, in float64."""
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    x = torch.randn(5, d_in, dtype=torch.float64)
    y = model(x)
    adapter = ll.attach(
        model, LoRA(r=r, alpha=alpha, rslora=rslora), targets="0", dtype=torch.float64
    )
    a, b = (p for _, p in sorted(adapter.named_parameters()))
    nn.init.normal_(b)
    s = alpha / (math.sqrt(r) if rslora else r)
    torch.testing.assert_close(model(x), y + s * x @ a.T @ b.T, rtol=1e-10, atol=1e-10)


def test_start_values() -> None:
    """A is uniform in ±1/√d_in (as in PEFT's default), B is 0."""
    model = nn.Sequential(nn.Linear(400, 300))
    adapter = ll.attach(model, "lora", r=64, targets="0")
    tensors = dict(adapter.named_parameters())
    a = tensors["0.A"].detach()
    assert float(a.abs().max()) <= 1 / 20
    assert float(a.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not tensors["0.B"].any()


def test_dropout_is_active_in_training_mode_only() -> None:
    """In eval mode dropout does nothing; in training mode it drops entries and keeps the mean."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    adapter = ll.attach(model, "lora", r=8, alpha=8.0, dropout=0.5, targets="0")
    with torch.no_grad():
        for _, p in adapter.named_parameters():
            p.copy_(torch.eye(8))
    x = torch.ones(20_000, 8)
    base = x @ model[0].weight.T
    delta = (model.train()(x) - base).detach()
    assert set(delta.round(decimals=3).unique().tolist()) == {0.0, 2.0}
    assert float(delta.mean()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(model.eval()(x), base + x)


def test_published_parameter_count() -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: 3.54M parameters and as many MACs a token."""
    with torch.device("meta"):
        model = nn.ModuleList(
            [nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)]
        )
    found = ll.plan(model, "lora", r=32)
    assert found.parameters == found.macs_per_token == 24 * 32 * (3584 + 1024) == 3_538_944


@pytest.mark.parametrize(
    "field",
    [
        {"r": 0},
        {"r": True},
        {"r": "8"},
        {"alpha": -1.0},
        {"alpha": math.inf},
        {"dropout": 1.0},
        {"rslora": 1},
    ],
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'lora': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "lora", targets="0", **field)
