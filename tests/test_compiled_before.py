"""A model that was compiled before sees an adapter that comes or goes afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., nn.Module]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module) -> Any:
    """torch.compile's wrapper."""
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> Any:
    """nn.Module.compile."""
    model.compile(backend="eager")
    return model


def by_blocks(model: nn.Module) -> Any:
    """Every block compiled, as transformers and torchtune do."""
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def function(model: nn.Module) -> Any:
    """A compiled function that calls the model."""
    return torch.compile(lambda x: model(x), backend="eager")


WAYS = (whole, in_place, by_blocks, function)


def changed(adapter: ll.Adapter, value: float = 0.1) -> ll.Adapter:
    """The adapter, with something to do."""
    with torch.no_grad():
        for index, p in enumerate(adapter.parameters()):
            p.add_(value * (1 + index % 3))
    return adapter


def warm(make: Make, way: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any, Tensor]:
    """A model, the compiled model after a few calls, and the base's output."""
    model = make()
    base = model(X).detach()
    compiled = way(model)
    for _ in range(2):
        compiled(X)
        with torch.no_grad():
            compiled(X)
    return model, compiled, base


@pytest.mark.parametrize("way", WAYS)
def test_the_first_adapter_is_seen(blocks: Make, way: Callable[[nn.Module], Any]) -> None:
    """Promise: after attach the warm compiled model computes with the adapter, and its parameters
    get gradients; after detach it is the base again.
    """
    model, compiled, base = warm(blocks, way)
    adapter = changed(ll.attach(model, "lora", r=2))
    with torch.no_grad():
        assert not torch.allclose(compiled(X), base, atol=1e-3)
    reference = blocks()
    changed(ll.attach(reference, "lora", r=2))
    torch.testing.assert_close(compiled(X), reference(X))
    compiled(X).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    adapter.detach()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), base)
    assert compiled(X).requires_grad


@pytest.mark.parametrize("way", [whole, by_blocks])
def test_an_adapter_of_a_frozen_model_is_seen(
    blocks: Make, way: Callable[[nn.Module], Any]
) -> None:
    """Promise: so is the first adapter of a model that is frozen already, where nothing that the
    compiler looks at changes but the hooks."""

    def make() -> nn.Module:
        return blocks().requires_grad_(False)

    model, compiled, base = warm(make, way)
    adapter = changed(ll.attach(model, "lora", r=2, layers=1))
    reference = make()
    changed(ll.attach(reference, "lora", r=2, layers=1))
    torch.testing.assert_close(compiled(X), reference(X))
    adapter.detach()
    torch.testing.assert_close(compiled(X), base)


@pytest.mark.parametrize("layers", [1, None], ids=["on other layers", "on all layers"])
@pytest.mark.parametrize("way", [whole, by_blocks])
def test_a_second_adapter_is_seen(
    blocks: Make, way: Callable[[nn.Module], Any], layers: int | None
) -> None:
    """Promise: so is a second one, on other layers or on the same, and its going."""
    reference = blocks()
    one = changed(ll.attach(reference, "lora", r=2, name="one", layers=0))
    with_one = reference(X).detach()
    changed(ll.attach(reference, "lora", r=2, name="two", layers=layers), 0.2)
    with_both = reference(X).detach()

    def make() -> nn.Module:
        model = blocks()
        changed(ll.attach(model, "lora", r=2, name="one", layers=0))
        return model

    model, compiled, base = warm(make, way)
    torch.testing.assert_close(base, with_one)
    two = changed(ll.attach(model, "lora", r=2, name="two", layers=layers), 0.2)
    torch.testing.assert_close(compiled(X), with_both)
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in two.parameters())
    two.detach()
    torch.testing.assert_close(compiled(X), with_one)
    one.detach()


@pytest.mark.parametrize("way", [whole, by_blocks])
def test_a_loaded_adapter_is_seen(
    blocks: Make, tmp_path: Path, way: Callable[[nn.Module], Any]
) -> None:
    """Promise: load is seen as attach is."""
    reference = blocks()
    changed(ll.attach(reference, "dora", r=2)).save(tmp_path / "a")
    model, compiled, _ = warm(blocks, way)
    ll.load(model, tmp_path / "a")
    torch.testing.assert_close(compiled(X), reference(X))


@pytest.mark.parametrize("through", ["wrapper", "model"])
def test_attaching_through_the_wrapper(blocks: Make, through: str) -> None:
    """Promise: it does not matter whether the compiled wrapper or the model itself is given."""
    model, compiled, base = warm(blocks, whole)
    target = compiled if through == "wrapper" else model
    changed(ll.attach(target, "lora", r=2))
    reference = blocks()
    changed(ll.attach(reference, "lora", r=2))
    torch.testing.assert_close(compiled(X), reference(X))
    ll.detach(target)
    torch.testing.assert_close(compiled(X), base)


def test_switches_of_a_compiled_model(blocks: Make) -> None:
    """Promise: scale, disabled() and frozen() are seen by a model that is warm with the adapter."""
    model, compiled, base = warm(blocks, whole)
    adapter = changed(ll.attach(model, "dora", r=2))
    reference = blocks()
    other = changed(ll.attach(reference, "dora", r=2))
    for scale in (0.5, 1.0):
        adapter.scale = other.scale = scale
        torch.testing.assert_close(compiled(X), reference(X))
        with adapter.disabled():
            torch.testing.assert_close(compiled(X), base)
        with adapter.frozen(), torch.no_grad():
            torch.testing.assert_close(compiled(X), reference(X))
    changed(adapter)
    changed(other)
    torch.testing.assert_close(compiled(X), reference(X))


def test_attach_imports_no_compiler() -> None:
    """Promise: where nothing was compiled, attach, load and detach do not load torch's compiler,
    which takes seconds.
    """
    code = """
import sys, torch, lora_lite as ll
from torch import nn
assert "torch._dynamo" not in sys.modules, "torch itself loads it"
model = nn.Sequential(nn.Linear(4, 4))
ll.attach(model, "lora", r=2, targets="0")
model(torch.ones(1, 4)).sum().backward()
ll.detach(model)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_a_model_that_was_compiled_before(blocks: Make) -> None:
    """Promise: training goes on as on a model that was not compiled before, and does not compile
    again with every step."""
    model, compiled, _ = warm(blocks, whole)
    reference = blocks()
    outputs = []
    for target, run in ((model, compiled), (reference, reference)):
        adapter = changed(ll.attach(target, "lora", r=2), 0.01)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            run(X).square().mean().backward()
            optimizer.step()
            if step == 1 and run is compiled:
                torch._dynamo.config.error_on_recompile = True
        torch._dynamo.config.error_on_recompile = False
        outputs.append(run(X).detach())
    torch.testing.assert_close(outputs[0], outputs[1])


def test_blocks_that_are_compiled_after_attach_do_not_share_a_graph(blocks: Make) -> None:
    """Promise: blocks that are compiled one by one, and of which some have an adapter, compute with
    theirs: a block without one looks the same to the compiler, but for the hooks."""
    model = blocks(depth=3)
    changed(ll.attach(model, "lora", r=2, layers=1))
    expected = model(X).detach()
    by_blocks(model)
    torch.testing.assert_close(model(X).detach(), expected)
