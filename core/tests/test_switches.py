"""Switches: disabled() and frozen() nest and overlap in any order, end cleanly, and are nobody
else's.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Counted(Variant, name="counted"):
    """Adds a vector, and counts how often it was prepared."""

    prepared: ClassVar[list[str]] = []

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"v": torch.randn(site.d_out, generator=rng("v"))}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        self.prepared.append(site.path)
        return {"w": 2 * t["v"]}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["w"].expand_as(y)


def model() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def attach(base: nn.Module, name: str = "default", seed: int = 0) -> ll.Adapter:
    """An adapter on both layers."""
    return ll.attach(base, Counted(), targets=".", name=name, seed=seed)


def output(base: nn.Module) -> Tensor:
    """Without gradients: under frozen() what is prepared is kept."""
    with torch.no_grad():
        out: Tensor = base(X)
    return out


def preparations(base: nn.Module) -> int:
    """How often one forward prepares."""
    Counted.prepared.clear()
    output(base)
    return len(Counted.prepared)


def expected(names: set[str]) -> Tensor:
    """What a model with these adapters, and no others, computes."""
    base = model()
    for name in sorted(names):
        attach(base, name, seed=ord(name[0]))
    return output(base)


# --- nesting and overlapping


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from(["disabled", "frozen"]), st.integers(0, 5)
        ),
        max_size=14,
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_contexts_in_any_order(steps: list[tuple[str, str, int]]) -> None:
    """Promise: whatever the order in which contexts of two adapters are entered and left, nested or
    not, an adapter is off exactly while at least one disabled() of it is open, and what it prepares
    is kept exactly while at least one frozen() of it is open."""
    outputs = {frozenset(names): expected(set(names)) for names in ("", "a", "b", "ab")}
    base = model()
    adapters = {name: attach(base, name, seed=ord(name)) for name in "ab"}
    opened: list[tuple[str, str, Any]] = []
    for name, what, choice in steps:
        if choice < len(opened):
            opened.pop(choice)[2].__exit__(None, None, None)
        else:
            context = getattr(adapters[name], what)()
            context.__enter__()
            opened.append((name, what, context))
        off = {n for n, w, _ in opened if w == "disabled"}
        frozen = {n for n, w, _ in opened if w == "frozen"}
        assert torch.equal(output(base), outputs[frozenset({"a", "b"} - off)])
        assert preparations(base) == 2 * len({"a", "b"} - off - frozen)
        for n, adapter in adapters.items():
            assert ("disabled" in repr(adapter)) == (n in off)
    for _, _, context in opened:
        context.__exit__(None, None, None)
    assert torch.equal(output(base), outputs[frozenset("ab")])
    assert preparations(base) == 4


def test_frozen_is_over_when_it_is_over() -> None:
    """Promise: after the last frozen() nothing prepared is kept: new values count at once."""
    base = model()
    adapter = attach(base)
    one, two = adapter.frozen(), adapter.frozen()
    one.__enter__()
    output(base)
    two.__enter__()
    one.__exit__(None, None, None)
    assert preparations(base) == 0
    two.__exit__(None, None, None)
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    assert torch.equal(output(base), output(model()))


def test_frozen_again_is_fresh() -> None:
    """Promise: a second frozen() starts from the values of its own time."""
    base = model()
    adapter = attach(base)
    with adapter.frozen():
        output(base)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(3)
    plain = output(base)
    with adapter.frozen():
        assert torch.equal(output(base), plain)


def raise_inside(context: AbstractContextManager[None], error: type[BaseException]) -> None:
    """Leave a context by an exception."""
    with context:
        raise error


@pytest.mark.parametrize("what", ["disabled", "frozen"])
def test_an_exception_inside_ends_the_context(what: str) -> None:
    """Promise: a context that is left by an exception, Ctrl-C included, ends as any other, and the
    exception comes through."""
    base = model()
    adapter = attach(base)
    plain = output(base)
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            raise_inside(getattr(adapter, what)(), error)
        assert torch.equal(output(base), plain)
        assert preparations(base) == 2


def test_a_forward_that_fails_under_a_context() -> None:
    """Promise: so does one whose forward fails half-way."""
    base = model()
    adapter = attach(base)
    plain = output(base)
    with pytest.raises(RuntimeError), adapter.disabled(), adapter.frozen():
        base(torch.randn(3, 5))
    assert torch.equal(output(base), plain)


def test_a_change_under_frozen_is_told_once_everything_is_over() -> None:
    """Promise: who changes an adapter inside frozen() is told on leaving; the change counts."""
    base = model()
    adapter = attach(base)
    context = adapter.frozen()
    context.__enter__()
    output(base)
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    with pytest.raises(ll.AdapterError, match=r"frozen\(\)"):
        context.__exit__(None, None, None)
    assert torch.equal(output(base), output(model()))
    assert preparations(base) == 2


def test_a_context_that_is_forgotten() -> None:
    """Promise: a context that is entered and dropped does not switch anything off for ever."""
    base = model()
    adapter = attach(base)
    plain = output(base)
    for what in ("disabled", "frozen"):
        getattr(adapter, what)()  # never entered
        context = getattr(adapter, what)()
        context.__enter__()
        del context
        gc.collect()
        assert torch.equal(output(base), plain)
        assert preparations(base) == 2


@pytest.mark.parametrize("scales", [(0.5, 2.0), (1.0, 1.0), (0.0, -1.0)])
def test_the_scale_may_change_under_frozen(scales: tuple[float, float]) -> None:
    """Promise: the scale is no part of what is kept."""
    base, plain = model(), model()
    adapter, other = attach(base), attach(plain)
    with adapter.frozen():
        for scale in scales:
            adapter.scale = other.scale = scale
            assert torch.equal(output(base), output(plain))


def test_frozen_with_gradients_prepares_afresh() -> None:
    """Promise: a forward with gradients under frozen() has them, and does not see what is kept."""
    base = model()
    adapter = attach(base)
    with adapter.frozen():
        output(base)
        base(X).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


# --- errors on entry, and detaching inside


@pytest.mark.parametrize("what", ["disabled", "frozen"])
def test_entering_on_a_detached_adapter(what: str) -> None:
    """Promise: an error on entry leaves nothing switched: the next adapter under the name is on."""
    base = model()
    adapter = attach(base)
    adapter.detach()
    with pytest.raises(ll.AdapterError, match="detached"), getattr(adapter, what)():
        pass
    again = attach(base)
    assert preparations(base) == 2
    assert "disabled" not in repr(again)


@pytest.mark.parametrize("what", ["disabled", "frozen"])
def test_detaching_inside(untouched: Untouched, what: str) -> None:
    """Promise: an adapter that is detached inside its own context is gone, the context ends without
    a word, and a new adapter under the name starts on and not frozen."""
    base = model()
    with untouched(base):
        adapter = attach(base)
        plain = output(base)
        with getattr(adapter, what)():
            output(base)
            adapter.detach()
            attach(base)
            assert preparations(base) == 2
        assert torch.equal(output(base), plain)
        assert preparations(base) == 2
        ll.detach(base)


@pytest.mark.parametrize("attached_inside", [True, False])
@pytest.mark.parametrize("what", ["disabled", "frozen"])
def test_inference_mode(what: str, attached_inside: bool) -> None:
    """Promise: under inference_mode, whose tensors count no versions, the contexts work."""
    base, plain = model(), output(model())
    with ExitStack() as stack:
        if attached_inside:
            stack.enter_context(torch.inference_mode())
        adapter = attach(base)
    adapted = output(base)
    with torch.inference_mode():
        with getattr(adapter, what)():
            for _ in range(2):
                assert torch.equal(base(X), plain if what == "disabled" else adapted)
        assert torch.equal(base(X), adapted)
    assert torch.equal(output(base), adapted)
    assert preparations(base) == 2
    with adapter.frozen():
        output(base)
        with torch.inference_mode():
            assert torch.equal(base(X), adapted)
        assert torch.equal(output(base), adapted)


def test_what_inference_mode_prepared_can_be_trained_with() -> None:
    """Promise: what was kept under inference_mode is not met by a forward that has gradients."""
    base = model()
    adapter = attach(base)
    with adapter.frozen():
        with torch.inference_mode():
            base(X)
        x = X.clone().requires_grad_()
        base(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in adapter.parameters())


# --- copies


def pickled(base: nn.Module) -> nn.Module:
    """Through torch.save."""
    torch.save(base, buffer := io.BytesIO())
    again: nn.Module = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    return again


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": pickled,
    "pickle": lambda base: pickle.loads(pickle.dumps(base)),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("what", ["disabled", "frozen", "both"])
def test_a_copy_made_inside_starts_clean(how: Callable[[nn.Module], nn.Module], what: str) -> None:
    """Promise: a copy that was made inside a context is in none: on, not frozen, with nothing kept;
    the original goes on as if nothing had been copied."""
    base = model()
    adapter = attach(base)
    plain = output(base)
    with ExitStack() as stack:
        for one in ("disabled", "frozen") if what == "both" else (what,):
            stack.enter_context(getattr(adapter, one)())
        inside = output(base)
        twin = how(base)
        assert torch.equal(output(base), inside)
    other = ll.adapters(twin)["default"]
    assert "disabled" not in repr(other)
    assert torch.equal(output(twin), plain)
    assert preparations(twin) == 2
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(output(twin), output(model()))
    assert torch.equal(output(base), plain)
    with other.disabled(), other.frozen():
        assert preparations(base) == 2


# --- enabled


def test_enabled_is_a_switch() -> None:
    """Promise: `adapter.enabled = False` takes the adapter out until it is set again, says so in
    its repr, and stands beside disabled(), which changes it for a while only.
    """
    base, plain = model(), output(model())
    adapter = attach(base)
    adapted = output(base)
    assert adapter.enabled is True
    adapter.enabled = False
    assert "disabled" in repr(adapter)
    assert torch.equal(output(base), plain)
    assert ll.adapters(base)["default"].enabled is False
    with adapter.disabled():
        pass
    assert adapter.enabled is False
    adapter.enabled = True
    with adapter.disabled():
        assert torch.equal(output(base), plain)
    assert torch.equal(output(base), adapted)
    for wrong in (None, 1, "yes", 0.0):
        with pytest.raises(ll.LoraLiteError, match="enabled"):
            adapter.enabled = wrong  # type: ignore[assignment]
    assert adapter.enabled is True
