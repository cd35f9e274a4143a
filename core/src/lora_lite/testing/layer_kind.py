"""The conformance suite for a kind of linear layer: what it tells of a layer, held against the
layer's own forward.

from lora_lite.testing import LayerKindTests

class TestMyKind(LayerKindTests):
    kind, layers = MyKind, [lambda: MyLinear(6, 4), lambda: MyLinear(4, 6, bias=False)]
MyLinear(4, 6, bias=False)]
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.author import LayerKind, Rng, Site, Tensors, TensorSpec, Variant
from lora_lite.plugins import kind_of
from lora_lite.testing.compare import TOLERANCE, all_same, close
from lora_lite.testing.promises.base import snapshot
from lora_lite.testing.sealed import refuse_replaced


class Doubled(Variant, name="doubled"):
    """Reads everything that a site has: Δy = g ⊙ (x Wᵀ + b), with g = 1 at the start, so that y' =
    2 y.
    """

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            "g": TensorSpec((site.d_out,)),
            "W": TensorSpec((site.d_out, site.d_in), trainable=False, derived=True),
        }

    def derive(self, site: Site) -> dict[str, Tensor]:
        return {
            "W": site.matmul(torch.eye(site.d_in, dtype=site.dtype, device=site.weight().device)).T
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"g": torch.ones(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        bias = site.bias().to(y.dtype) if site.has_bias else 0
        return t["g"] * (x @ t["W"].T + bias)


class LayerKindTests:
    """Every promise of a `LayerKind`, one test each: subclass it as `TestMyKind`, and set `kind`
    and `layers`. Its tests can be neither overridden nor removed.

    Attributes:
        kind: the class.
        layers: functions that make a layer of this kind, with weights that are not zero: with and
            without a bias where there are both, and of other d_in than d_out.
        tolerance: how far, relative to the largest output, a forward may be from x Wᵀ + b. By
            default, a few roundings in the dtype that the layer computes in; a quantised layer may
            need more.
    """

    kind: ClassVar[type[LayerKind]]
    layers: ClassVar[Sequence[Callable[[], nn.Module]]] = ()
    tolerance: ClassVar[float | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_replaced(cls, LayerKindTests)

    def test_recognises_its_layers_and_no_others(self) -> None:
        """`matches` is true of its layers, and false of other modules, plain `nn.Linear` and a
        subclass with its own forward among them.

        Weights of a layer that computes something else would be misread in silence. Usually broken
        by isinstance alone, which a subclass with another forward passes, or by an attribute that
        other modules have too, or that they miss.
        """
        others = [
            nn.Identity(),
            nn.LayerNorm(4),
            nn.Conv1d(4, 4, 1),
            nn.Embedding(4, 4),
            nn.Bilinear(4, 4, 4),
            nn.ModuleList(),
        ]
        for kind, layer in self._each():
            if type(layer) is not nn.Linear:
                others.append(nn.Linear(4, 4))
            for other in others:
                assert kind.matches(other) is False, f"{kind} takes {other} for its own"
            layer.__class__ = type("Own", (type(layer),), {"forward": nn.Identity.forward})
            assert kind.matches(layer) is False, (
                f"{kind} takes a subclass of {type(layer).__base__}, with another forward, for "
                "its own"
            )

    def test_shape_is_the_forwards(self) -> None:
        """`shape` is (d_in, d_out): what the forward takes and gives; for floating-point layers
        also on the meta device.

        Tensors are made after it. Usually broken by d_out before d_in, or by packed weights whose
        shape is another one. A suite whose layers are all square would not notice.
        """
        square = True
        for kind, layer in self._each():
            d_in, d_out = kind.shape(layer)
            y = layer(_inputs(kind, layer, 2, 3))
            assert y.shape == (2, 3, d_out), (
                f"shape tells {d_in} -> {d_out}; an x of {[2, 3, d_in]} gives {list(y.shape)}"
            )
            assert kind.weight(layer).shape == (d_out, d_in), (
                f"weight is {list(kind.weight(layer).shape)}, not {[d_out, d_in]}"
            )
            square &= d_in == d_out
            if _is_unquantised(layer):
                on_meta = kind.shape(layer.to("meta"))
                assert on_meta == (d_in, d_out), (
                    f"on the meta device, shape tells {on_meta} instead of {(d_in, d_out)}"
                )
        assert not square, "all of `layers` are square; give one with d_in other than d_out"

    def test_weight_and_bias_give_the_forward(self) -> None:
        """The layer computes x Wᵀ + b with the `weight` and `bias` that the kind tells, and passes
        the gradient g W on to x; W is dense and a floating-point tensor.

        Methods start from W. Usually broken by a transpose, a scale or zero point that is
        forgotten, or a bias under another name.
        """
        for kind, layer in self._each():
            self._agree(kind, layer)

    def test_dtype_is_what_the_layer_computes_in(self) -> None:
        """`dtype` is that of the output for an input of this dtype; and where all of a layer's
        parameters are floating-point numbers, it goes with them when the layer is converted.

        Frozen tensors are kept in it. Usually broken by the dtype of packed weights (uint8), or by
        one that is fixed.
        """
        for kind, layer in self._each():
            dtypes = [kind.dtype(layer)]
            if _is_unquantised(layer):
                dtypes += [torch.bfloat16, torch.float64]
            for number, dtype in enumerate(dtypes):
                told = kind.dtype(layer.to(dtype) if number else layer)
                assert told == dtype, f"dtype tells {told} of a layer in {dtype}"
                y = layer(_inputs(kind, layer, 2))
                assert y.dtype == dtype, f"dtype tells {dtype}, and the layer gives {y.dtype}"

    def test_matmul_is_the_product_with_the_weight(self) -> None:
        """`matmul` is M Wᵀ for M of any number of rows and any floating-point dtype, in M's dtype,
        and a constant to gradients.

        Usually broken by W instead of Wᵀ, by the layer's own forward with its bias, or by dtypes
        that do not mix.
        """
        for kind, layer in self._each():
            w = kind.weight(layer).detach()
            for rows, dtype in (
                (3, torch.float32),
                (0, torch.float32),
                (1, torch.float64),
                (3, kind.dtype(layer)),
            ):
                m = _normal(rows, w.shape[1]).to(device=w.device, dtype=dtype)
                found = kind.matmul(layer, m)
                assert not found.requires_grad, (
                    "matmul's result requires a gradient; detach the weight"
                )
                close(
                    found,
                    m @ w.to(dtype).T,
                    f"matmul of {rows} rows in {dtype}",
                    self._tolerance(dtype),
                )

    def test_reading_writes_nothing(self) -> None:
        """Asked for everything, a kind changes no bit, flag, attribute or hook of the layer; and
        asked again, it says the same.

        Usually broken by dequantising in place, by a cache on the module, or by `.data` of a view.
        """
        for kind, layer in self._each():
            before, state = snapshot(layer), _state(layer)
            first = self._read(kind, layer)
            assert snapshot(layer) == before, (
                f"reading changed the layer: {_changes(before, snapshot(layer))}"
            )
            all_same(_state(layer), state, "the layer's state after reading")
            all_same(self._read(kind, layer), first, "asked again")

    def test_enter_and_exit_leave_no_trace(self) -> None:
        """Between `enter` and `exit` the layer computes x Wᵀ + b as before; after `exit` it is bit
        for bit what it was.

        Detaching an adapter gives back the very model. Usually broken by an `exit` that forgets an
        attribute, or by converting a weight and back.
        """
        for kind, layer in self._each():
            before, state = snapshot(layer), _state(layer)
            for _ in range(2):
                kind.enter(layer)
                self._agree(kind, layer)
                kind.exit(layer)
                assert snapshot(layer) == before, (
                    f"exit left a trace: {_changes(before, snapshot(layer))}"
                )
                all_same(_state(layer), state, "the layer's state after exit")

    def test_keeps_nothing(self) -> None:
        """A kind is made without arguments, holds nothing, is equal to any other of its class, and
        pickles.

        Hooks hold it, and copies of a model must not share a layer through it. Usually broken by a
        cache on `self`.
        """
        for kind, layer in self._each():
            self._read(kind, layer)
            kind.enter(layer)
            kind.exit(layer)
            assert not vars(kind), f"{kind} holds {vars(kind)}"
            again = pickle.loads(pickle.dumps(kind))
            assert again == kind == self.kind(), f"{kind} is not equal to its copy"
            assert hash(again) == hash(kind), f"{kind} and its copy have different hashes"

    def test_is_found_and_carries_an_adapter(self) -> None:
        """The installed entry point finds the kind for its layers, and an adapter that reads all of
        a site doubles the layer's output; after detach the layer is bit for bit what it was.

        Usually broken by an entry point that is not named after the root package of the layers'
        class, so that nobody looks there.
        """
        for kind, layer in self._each():
            package = type(layer).__module__.partition(".")[0]
            found = kind_of(layer)
            assert found == kind, (
                f"the core finds {found} for {type(layer)}; expected an entry point {package!r} in "
                f"the group lora_lite.layers that gives {self.kind.__qualname__}"
            )
            x = _inputs(kind, layer, 2, 3)
            expected = layer(x).detach() * 2
            before, state = snapshot(layer), _state(layer)
            adapter = ll.attach(nn.ModuleList([layer]), Doubled(), targets="")
            close(
                layer(x).detach(), expected, "twice the output", self._tolerance(kind.dtype(layer))
            )
            adapter.detach()
            assert snapshot(layer) == before, f"after detach: {_changes(before, snapshot(layer))}"
            all_same(_state(layer), state, "the layer's state after detach")

    def _each(self) -> Iterator[tuple[LayerKind, nn.Module]]:
        refuse_replaced(type(self), LayerKindTests)
        assert self.layers, "layers = [...] is empty: give functions that make layers of this kind"
        for make in self.layers:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layer = make().requires_grad_(False).eval()
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(1 + _normal(*bias.shape))  # a bias of zeros would hide mistakes
            kind = self.kind()
            assert kind.matches(layer) is True, (
                f"{kind} does not match {layer}, which `layers` makes"
            )
            yield kind, layer

    def _agree(self, kind: LayerKind, layer: nn.Module) -> None:
        x = _inputs(kind, layer, 2, 3).requires_grad_()
        y = layer(x)
        w, bias = kind.weight(layer).detach(), kind.bias(layer)
        assert w.is_floating_point(), f"weight is {w.dtype}; expected W dequantised"
        assert w.layout is torch.strided, f"weight is {w.layout}; expected a dense W"
        assert bool(w.any()), "the weight is zero; give layers whose weights are not"
        expected = x.detach().double() @ w.double().T + (
            0 if bias is None else bias.detach().double()
        )
        tolerance = self._tolerance(kind.dtype(layer))
        close(
            y.detach().double(),
            expected,
            f"the forward, against x Wᵀ + {'0' if bias is None else 'b'}",
            tolerance,
        )
        (gradient,) = torch.autograd.grad(y.double().square().sum() / 2, x)
        close(
            gradient.double(),
            y.detach().double() @ w.double(),
            "the gradient by x, against g W",
            2 * tolerance,
        )

    def _read(self, kind: LayerKind, layer: nn.Module) -> dict[str, Tensor]:
        """All that a kind tells, as tensors."""
        d_in, d_out = kind.shape(layer)
        told = {"shape": torch.tensor([d_in, d_out]), "weight": kind.weight(layer).detach().clone()}
        told["matmul"] = kind.matmul(
            layer, torch.ones(2, d_in, dtype=kind.dtype(layer), device=told["weight"].device)
        )
        bias = kind.bias(layer)
        return told if bias is None else {**told, "bias": bias.detach().clone()}

    def _tolerance(self, dtype: torch.dtype) -> float:
        return self.tolerance or TOLERANCE[dtype]


def _inputs(kind: LayerKind, layer: nn.Module, *shape: int) -> Tensor:
    device = next(layer.parameters()).device
    return _normal(*shape, kind.shape(layer)[0]).to(device=device, dtype=kind.dtype(layer))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _is_unquantised(layer: nn.Module) -> bool:
    return all(parameter.is_floating_point() for parameter in layer.parameters())


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }
