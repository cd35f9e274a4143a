"""The suite for layer kinds: the core's own pass it, a quantised stranger passes it, and each
mistake is caught by its test.
"""

from collections.abc import Callable

import pytest
import torch
from lora_lite import LayerKind
from lora_lite.layers import Conv1D, Linear
from lora_lite.testing import LayerKindTests
from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D


class TestLinear(LayerKindTests):
    kind = Linear
    layers = [
        lambda: nn.Linear(6, 4),
        lambda: nn.Linear(4, 6, bias=False),
        lambda: nn.Linear(5, 5).to(torch.bfloat16),
    ]


class TestConv1D(LayerKindTests):
    kind, layers = (
        Conv1D,
        [lambda: TransformersConv1D(4, 6), lambda: TransformersConv1D(5, 5).double()],
    )


class Coded(nn.Module):
    """y = scale ⊙ (x codesᵀ) + offset, with codes of 8 bits: a quantised layer."""

    def __init__(self, d_in: int, d_out: int, offset: bool = True) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        codes = torch.randint(-128, 128, (d_out, d_in), dtype=torch.int8, generator=rng)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.rand(d_out, generator=rng) / 64)
        self.offset = nn.Parameter(torch.randn(d_out, generator=rng)) if offset else None

    def forward(self, x):
        y = self.scale * (x @ self.codes.to(x.dtype).T)
        return y if self.offset is None else y + self.offset


class Sound(LayerKind):
    def matches(self, module):
        return type(module) is Coded

    def shape(self, module):
        return module.codes.shape[1], module.codes.shape[0]

    def weight(self, module):
        return module.codes.to(module.scale.dtype) * module.scale[:, None]

    def bias(self, module):
        return module.offset


class OfCoded(LayerKindTests):
    """Not collected, by its name: its tests are called one by one."""

    kind, layers = Sound, [lambda: Coded(6, 4), lambda: Coded(3, 5, offset=False)]


NAMES = [name for name in dir(LayerKindTests) if name.startswith("test_")]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "test_is_found_and_carries_an_adapter"]
)
def test_a_quantised_layer_of_a_stranger(name: str) -> None:
    getattr(OfCoded(), name)()


BROKEN: list[tuple[type[LayerKind], str, str]] = []


def caught_by(test: str, told: str) -> Callable[[type[LayerKind]], type[LayerKind]]:
    """The test that catches a kind, and what it says."""

    def register(cls: type[LayerKind]) -> type[LayerKind]:
        BROKEN.append((cls, f"test_{test}", told))
        return cls

    return register


@caught_by("recognises_its_layers_and_no_others", "a subclass of .*Coded.*, with another forward")
class TakesSubclasses(Sound):
    def matches(self, module):
        return isinstance(module, Coded)


@caught_by("recognises_its_layers_and_no_others", "takes LayerNorm")
class TakesWhatHasAWeight(Sound):
    def matches(self, module):
        return hasattr(module, "codes") or hasattr(module, "weight")


@caught_by("recognises_its_layers_and_no_others", "does not match Coded")
class MissesItsOwn(Sound):
    def matches(self, module):
        return hasattr(module, "bias")


@caught_by("shape_is_the_forwards", "shape tells|shapes cannot be multiplied")
class TurnsTheShape(Sound):
    def shape(self, module):
        return tuple(module.codes.shape)


@caught_by("shape_is_the_forwards", r"weight is \[6, 4\], not \[4, 6\]")
class TurnsTheWeight(Sound):
    def weight(self, module):
        return super().weight(module).T


@caught_by("weight_and_bias_give_the_forward", "the forward, against x Wᵀ")
class ForgetsTheScale(Sound):
    def weight(self, module):
        return module.codes.to(module.scale.dtype)


@caught_by("weight_and_bias_give_the_forward", "the forward, against x Wᵀ \\+ 0")
class MissesTheBias(Sound):
    def bias(self, module):
        return getattr(module, "bias", None)


@caught_by("weight_and_bias_give_the_forward", "weight is torch.int8; expected W dequantised")
class GivesTheCodes(Sound):
    def weight(self, module):
        return module.codes

    def dtype(self, module):
        return module.scale.dtype


@caught_by(
    "dtype_is_what_the_layer_computes_in", "not implemented for|dtype tells|expected|not supported"
)
class TellsTheCodesDtype(Sound):
    def dtype(self, module):
        return module.codes.dtype


@caught_by("dtype_is_what_the_layer_computes_in", "dtype tells torch.float16, and the layer gives")
class TellsHalf(Sound):
    def dtype(self, module):
        return torch.float16


@caught_by("matmul_is_the_product_with_the_weight", "shapes cannot be multiplied")
class MultipliesTheOtherWay(Sound):
    def matmul(self, module, m):
        return m @ self.weight(module).detach().to(m.dtype)


@caught_by(
    "matmul_is_the_product_with_the_weight",
    "matmul of 3 rows in torch.float32: 12 of 12 entries differ",
)
class AddsTheBias(Sound):
    def matmul(self, module, m):
        return module(m).detach()


@caught_by(
    "matmul_is_the_product_with_the_weight",
    "matmul of 1 rows in torch.float64: got|have the same dtype",
)
class MultipliesInItsOwnDtype(Sound):
    def matmul(self, module, m):
        return m @ self.weight(module).detach().T


@caught_by("reading_writes_nothing", "reading changed the layer: .*attributes")
class CachesOnTheLayer(Sound):
    def weight(self, module):
        module.dense = super().weight(module)
        return module.dense


@caught_by("reading_writes_nothing", "reading changed the layer: .*scale")
class DequantisesInPlace(Sound):
    def weight(self, module):
        with torch.no_grad():
            module.scale.mul_(1)
        return super().weight(module)


@caught_by("enter_and_exit_leave_no_trace", "exit left a trace: .*attributes")
class LeavesAnAttribute(Sound):
    def enter(self, module):
        module.entered = True


@caught_by("enter_and_exit_leave_no_trace", "the layer's state after exit: scale")
class ConvertsAndBack(Sound):
    def enter(self, module):
        module.scale.data = module.scale.data.to(torch.bfloat16).float()


@caught_by("keeps_nothing", "holds {'dense'")
class CachesOnItself(Sound):
    def weight(self, module):
        self.dense = super().weight(module)
        return self.dense


@caught_by(
    "is_found_and_carries_an_adapter",
    "finds None for .*expected an entry point .* in the group lora_lite.layers",
)
class IsNotInstalled(Sound):
    pass


@pytest.mark.parametrize(
    ("kind", "test", "told"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN]
)
def test_each_mistake_is_caught_by_its_test(kind: type[LayerKind], test: str, told: str) -> None:
    tests = type("Broken", (OfCoded,), {"kind": kind})()
    with pytest.raises(Exception, match=told):
        getattr(tests, test)()


def test_every_test_has_a_mistake_that_it_catches() -> None:
    assert {test for _, test, _ in BROKEN} == set(NAMES)


def test_every_test_says_what_why_and_what_breaks_it() -> None:
    for name in NAMES:
        what, why = (getattr(LayerKindTests, name).__doc__ or "").split("\n\n")
        assert what, name
        assert "Usually broken" in " ".join(why.split()), name


def test_square_layers_alone_are_not_enough() -> None:
    tests = type("Square", (OfCoded,), {"layers": [lambda: Coded(4, 4)]})()
    with pytest.raises(AssertionError, match="all of `layers` are square"):
        tests.test_shape_is_the_forwards()


def test_no_layers_are_not_enough() -> None:
    with pytest.raises(AssertionError, match="is empty"):
        type("None", (OfCoded,), {"layers": []})().test_keeps_nothing()


def test_tests_cannot_be_overridden_or_removed() -> None:
    for replacement in (None, lambda _: None):
        with pytest.raises(
            TypeError,
            match="test_keeps_nothing: the suite's tests can be neither overridden nor removed",
        ):
            type("Replaces", (OfCoded,), {"test_keeps_nothing": replacement})
    changed = type("Changed", (OfCoded,), {})
    changed.test_keeps_nothing = None  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        changed().test_shape_is_the_forwards()
