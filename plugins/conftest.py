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


@pytest.fixture(scope="session")
def qwen_down_proj() -> nn.Module:
    """The 24 down_proj of a 0.8B Qwen3.5, without weights."""
    with torch.device("meta"):
        return nn.ModuleList(
            [nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)]
        )
