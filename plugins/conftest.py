"""What the plugins' tests share: PEFT as an independent implementation of the same methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Theirs:
    """Where PEFT keeps one of our parameters.

    Attributes:
        suffix: of its name, after the layer's path.
        shape: from our shape to theirs.
        offset: what theirs is more than ours: a number, or the name of a frozen tensor of ours.
    """

    suffix: str
    shape: Callable[[Tensor], Tensor] = lambda t: t
    offset: float | str = 0.0


@pytest.fixture
def biased_llama(tiny_llama: Callable[..., nn.Module]) -> Callable[[bool, torch.dtype], nn.Module]:
    """Makes tiny Llamas, with random biases on all projections or with none."""

    def make(bias: bool, dtype: torch.dtype) -> nn.Module:
        model = tiny_llama(attention_bias=bias, mlp_bias=bias, initializer_range=0.3)
        rng = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(generator=rng)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def theirs() -> type[Theirs]:
    """The class with which a test says where PEFT keeps a parameter."""
    return Theirs


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def equals_peft(
    request: pytest.FixtureRequest, biased_llama: Callable[..., nn.Module]
) -> Callable[..., None]:
    """Asserts that the same tensors give PEFT's logits and gradients, with and without bias.

    Differences are relative to the largest logit, and to the largest gradient of tensors of one
    name.
    """
    peft = pytest.importorskip("peft")
    dtype: torch.dtype = request.param

    def check(
        variant: ll.Variant,
        config: Callable[[list[str]], Any],
        tensors: Mapping[str, Theirs],
        *,
        targets: str = r"(v|down|up)_proj$",
        noise: float = 0.25,
        **options: Any,
    ) -> None:
        for bias in (False, True):
            ours, base = biased_llama(bias, dtype), biased_llama(bias, dtype)
            plain = ours(input_ids=TOKENS).logits
            adapter = ll.attach(ours, variant, targets=targets, dtype=dtype, **options)
            theirs = (
                peft.get_peft_model(base, config(list(adapter.sites)), autocast_adapter_dtype=False)
                .to(dtype)
                .eval()
            )
            pairs = _fill(adapter, theirs, tensors, noise)
            assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
            logits = []
            for model in (ours, theirs):
                output = model(input_ids=TOKENS, labels=TOKENS)
                output.loss.backward()
                logits.append(output.logits)
            assert relative(logits[0], plain) > 1e-2  # the adapter does something
            assert relative(logits[0], logits[1]) <= TOLERANCE[dtype]
            for tensor, where in tensors.items():
                mine = torch.cat(
                    [where.shape(_gradient(p)).flatten() for name, p, _ in pairs if name == tensor]
                )
                other = torch.cat(
                    [_gradient(p).flatten() for name, _, p in pairs if name == tensor]
                )
                assert relative(mine, other) <= TOLERANCE[dtype], (
                    f"gradient of {tensor}, bias={bias}"
                )

    return check


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _fill(
    adapter: ll.Adapter, theirs: nn.Module, tensors: Mapping[str, Theirs], noise: float
) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """Draw our parameters, give PEFT the same, and pair them: (tensor, ours, theirs)."""
    named, state = dict(theirs.named_parameters()), adapter.state_dict()
    rng = torch.Generator().manual_seed(1)
    pairs = []
    for name, mine in adapter.named_parameters():
        path, tensor = name.rsplit(".", 1)
        where = tensors[tensor]
        other = named[f"base_model.model.{path}.{where.suffix}"]
        offset = state[f"{path}.{where.offset}"] if isinstance(where.offset, str) else where.offset
        with torch.no_grad():
            mine.copy_(noise * torch.randn(mine.shape, generator=rng, dtype=mine.dtype))
            other.copy_(where.shape(mine + offset))
        pairs.append((tensor, mine, other))
    return pairs


@pytest.fixture
def half_precision() -> Callable[..., None]:
    """Asserts that a trained adapter's Δ is as right in half precision as LoRA's, up to twice.

    All parameters move by 0.01 from the start, on a layer of 96 -> 64. The error is that of Δ
    itself, before it is added to y, relative to Δ in float64.
    """

    def error(variant: str, dtype: torch.dtype, **fields: Any) -> float:
        rng = torch.Generator().manual_seed(0)
        layer = nn.Linear(96, 64, bias=False).to(dtype)
        model = nn.Sequential(layer)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(64, 96, generator=rng) / 10)
        x = torch.randn(128, 96, generator=rng).to(dtype)
        y = model(x).detach()
        exact = nn.Sequential(nn.Linear(96, 64, bias=False)).double()
        exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
        (placement,) = ll.plan(model, variant, targets="0", **fields).placements
        adapter = ll.attach(model, variant, targets="0", **fields)
        double = ll.attach(exact, variant, targets="0", dtype=torch.float64, **fields)
        for p in adapter.parameters():
            p.data.add_(0.01 * torch.randn(p.shape, generator=rng))
        double.load_state_dict(
            {k: v.to(double.state_dict()[k]) for k, v in adapter.state_dict().items()}
        )
        t = {
            key.split(".")[1].partition(":")[0]: value
            for key, value in adapter.state_dict().items()
        }
        specs = adapter.variant.tensors(placement.site)
        read = {
            key: value
            if not value.is_floating_point()
            else value.to(torch.float32 if specs[key].compute == "float32" else dtype)
            for key, value in t.items()
        }
        read |= adapter.variant.prepare(placement.site, read) or {}
        found = adapter.variant.delta_output(placement.site, read, x, y).double()
        plain = x.double() @ layer.weight.detach().double().T
        expected = exact(x.double()).detach() - plain
        return float((found - expected).norm() / expected.norm())

    def check(variant: str, **fields: Any) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            assert error(variant, dtype, **fields) <= 2 * error("lora", dtype)

    return check


@pytest.fixture(scope="session")
def qwen_down_proj() -> nn.Module:
    """The 24 down_proj of a 0.8B Qwen3.5, without weights."""
    with torch.device("meta"):
        return nn.ModuleList(
            [nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)]
        )
