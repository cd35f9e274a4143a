"""Threads: the first use of a plugin, forwards in parallel, attach and detach at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Threads take turns as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each task returned or raised, all of them started at the same moment."""
    barrier, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = tasks[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(tasks))]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def filled(adapter: ll.Adapter, value: float) -> ll.Adapter:
    """The adapter with this number everywhere."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(value)
    return adapter


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        out: Tensor = model(x)
    return out


# --- plugins


FIRST_USE = """
import sys, threading
import lora_lite as ll
from torch import nn

sys.setswitchinterval(1e-6)
names = sys.argv[1:]
barrier, wrong = threading.Barrier(2 * len(names)), []

def use(name):
    barrier.wait()
    try:
        ll.attach(nn.Sequential(nn.Linear(4, 4)), name, r=4, targets=".")
    except Exception as error:
        wrong.append(f"{name}: {type(error).__name__}: {error}")

threads = [threading.Thread(target=use, args=(name,)) for name in names for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("\\n".join(wrong) or "right")
"""


@pytest.mark.parametrize("names", [["lora"] * 4, ["lora", "dora", "pissa", "antipasto", "hra"]])
def test_first_use_of_plugins_by_many_threads(names: list[str]) -> None:
    """Promise: in a fresh process any number of threads may use one plugin, or several, for the
    first time at once."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, *names], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stdout + done.stderr


# --- forwards


@pytest.mark.parametrize("frozen", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize("variant", ["lora", "dora", "antipasto"])
def test_forwards_in_parallel(blocks: Make, variant: str, frozen: bool) -> None:
    """Promise: several threads may run one adapted model at once, with other batches each, also
    under frozen(): each gets bit for bit what it gets alone."""
    model = blocks()
    adapter = filled(ll.attach(model, variant, r=4), 0.1)
    batches = [torch.randn(3, 8) for _ in range(6)]
    alone = [logits(model, x) for x in batches]

    def run(x: Tensor) -> list[Tensor]:
        return [logits(model, x) for _ in range(20)]

    tasks = [lambda x=x: run(x) for x in batches]
    if frozen:
        with adapter.frozen():
            results = together(tasks)
    else:
        results = together(tasks)
    for outputs, expected in zip(results, alone, strict=True):
        assert not isinstance(outputs, Exception), outputs
        assert all(torch.equal(output, expected) for output in outputs)


def test_gradients_in_parallel(blocks: Make) -> None:
    """Promise: so may several threads that take gradients."""
    model = blocks()
    adapter = filled(ll.attach(model, "lora", r=4), 0.1)
    batches = [torch.randn(3, 8) for _ in range(4)]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), list(adapter.parameters()))

    alone = [gradients(x) for x in batches]
    results = together([lambda x=x: gradients(x) for x in batches])
    for found, expected in zip(results, alone, strict=True):
        assert not isinstance(found, Exception), found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_contexts_of_several_threads(blocks: Make) -> None:
    """Promise: threads that enter and leave disabled() and frozen() as they like leave nothing
    switched when all are done."""
    model = blocks()
    adapter = filled(ll.attach(model, "dora", r=4), 0.1)
    x = torch.randn(3, 8)
    adapted = logits(model, x)

    def switch() -> None:
        for _ in range(30):
            with adapter.disabled():
                logits(model, x)
            with adapter.frozen():
                logits(model, x)

    assert together([switch] * 5) == [None] * 5
    assert torch.equal(logits(model, x), adapted)
    assert "disabled" not in repr(adapter)
    filled(adapter, 0.2)
    assert not torch.equal(logits(model, x), adapted), "something is still kept"


def test_disabled_is_of_its_thread_or_says_that_it_is_not(blocks: Make) -> None:
    """Promise: disabled() holds for its own thread, or its documentation says: for all."""
    model = blocks()
    adapter = filled(ll.attach(model, "lora", r=4), 0.1)
    x = torch.randn(3, 8)
    adapted, seen = logits(model, x), []
    with adapter.disabled():
        thread = threading.Thread(target=lambda: seen.append(logits(model, x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], adapted) or "thread" in (ll.Adapter.disabled.__doc__ or "")


# --- attach and detach


def test_several_models(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """Promise: threads that work on models of their own do not notice one another."""
    models = [blocks() for _ in range(4)]
    x = torch.randn(3, 8)
    base = logits(models[0], x)

    def work(index: int) -> None:
        model, path = models[index], tmp_path / f"{index}"
        for _ in range(4):
            for variant in ("lora", "antipasto"):
                adapter = filled(ll.attach(model, variant, r=4), 0.1 * (index + 1))
                expected = logits(model, x)
                adapter.save(path)
                adapter.detach()
                assert torch.equal(logits(model, x), base)
                assert torch.equal(logits(model, x), base)
                loaded = ll.load(model, path)
                assert torch.equal(logits(model, x), expected)
                loaded.detach()

    with untouched(models[0]), untouched(models[3]):
        results = together([lambda index=index: work(index) for index in range(4)])
    assert results == [None] * 4


@pytest.mark.parametrize("trial", range(3))
def test_several_adapters_come_to_one_model_at_once(
    blocks: Make, untouched: Untouched, trial: int
) -> None:
    """Promise: threads that attach to one model under names of their own all succeed, the model
    computes the sum, and when all have detached at once it is bit for bit what it was."""
    names = [f"n{trial}{index}" for index in range(6)]
    model, other = blocks(), blocks()
    x = torch.randn(3, 8)
    with untouched(model):
        attached = together(
            [lambda name=name: ll.attach(model, "lora", r=2, name=name) for name in names]
        )
        assert [a for a in attached if not isinstance(a, ll.Adapter)] == []
        assert sorted(ll.adapters(model)) == names
        for index, name in enumerate(names):
            filled(ll.adapters(model)[name], 0.05 * index)
            filled(ll.attach(other, "lora", r=2, name=name), 0.05 * index)
        assert torch.equal(logits(model, x), logits(other, x))
        detached = together([adapter.detach for adapter in attached])
        assert detached == [None] * len(names)


@pytest.mark.parametrize("trial", range(8))
def test_one_name_for_several_threads(blocks: Make, untouched: Untouched, trial: int) -> None:
    """Promise: of several threads that attach under one name exactly one succeeds, and the others
    are told; of several that detach it, likewise.
    """
    model = blocks()
    with untouched(model):
        results = together(
            [lambda: ll.attach(model, "lora", r=2, name=f"n{trial}") for _ in range(6)]
        )
        lost = [r for r in results if isinstance(r, ll.AdapterError)]
        (adapter,) = [r for r in results if isinstance(r, ll.Adapter)]
        assert len(lost) == 5, results
        ends = together([adapter.detach for _ in range(4)])
        assert sum(end is None for end in ends) >= 1
        assert all(end is None or isinstance(end, ll.AdapterError) for end in ends), ends


def test_attach_and_detach_beside_another_adapter(blocks: Make, untouched: Untouched) -> None:
    """Promise: adapters that come and go in several threads leave one that stays as it is, and the
    base frozen while it is there."""
    model = blocks()
    x = torch.randn(3, 8)
    with untouched(model):
        stays = filled(ll.attach(model, "lora", r=2, name="stays"), 0.1)
        expected = logits(model, x)

        def come_and_go(name: str) -> None:
            for _ in range(10):
                ll.attach(model, "lora", r=2, name=name).detach()

        results = together([lambda name=name: come_and_go(name) for name in ("a", "b", "c")])
        assert results == [None] * 3
        assert list(ll.adapters(model)) == ["stays"]
        assert torch.equal(logits(model, x), expected)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_stays" in name for name in trained)
        stays.detach()
