"""Everything about a variant that can be observed, to tell whether two of them differ at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.author import Site, Variant
from lora_lite.testing import inside
from lora_lite.testing.case import Case, move

# How far the parameters are moved before they are projected: far enough to leave any allowed set.
FAR = 3.0


def behaves_alike(one: Case, other: Case) -> bool:
    """Whether two cases cannot be told apart, to the bit."""
    return all(a == b for a, b in zip(_observations(one), _observations(other), strict=False))


def fields_read(case: Case, stage: str) -> set[str]:
    """The attributes that a variant's methods read from it: at the "start", or in the "forward"."""
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    with inside.attributes_read(type(variant)) as seen:
        if stage == "start":
            _call_the_start(variant, case.sites(model)[path], case)
        elif stage == "schedule":
            _call_the_schedule(variant, case.sites(model)[path], model.get_submodule(path))
        else:
            _call_the_forward(variant, case.sites(model)[path], model.get_submodule(path), case)
        return set(seen)


def _call_the_start(variant: Variant, site: Site, case: Case) -> None:
    """Every method that has a part in the start values, by hand."""
    variant.tensors(site)
    observer, statistics = variant.observe(site), {}
    if observer is not None:
        x = case.inputs(64)
        inside.observe(observer, x, case.model().layer(x).detach())
        statistics = observer.result()
    with torch.no_grad(), suppress(ll.CalibrationError):
        variant.specialize({site.path: site}, {site.path: statistics})
        variant.init(site, variant.derive(site), statistics, lambda _: torch.Generator())


def _call_the_forward(variant: Variant, site: Site, layer: nn.Module, case: Case) -> None:
    """Every method that is called in a forward or after a step, by hand, in both modes."""
    x = case.inputs(2, 3)
    y = case.model().layer(x)
    values = inside.stored(layer)
    for training in (False, True):
        layer.train(training)
        t = inside.read(variant, site, values)
        t.update(inside.prepared(variant, site, t))
        inside.deltas(variant, site, t, x, y)
    variant.penalty(site, values)
    with torch.no_grad():
        variant.project(site, dict(values))


@torch.no_grad()
def _call_the_schedule(variant: Variant, site: Site, layer: nn.Module) -> None:
    """What follows the number of the step, at its beginning and beyond its end."""
    for step in (1, inside.LATE):
        variant.advance({site.path: site}, {site.path: inside.stored(layer)}, step)


def _observations(case: Case) -> Iterator[Any]:
    """From cheap to expensive, so that most differences are found at once."""
    placements = case.plan().placements
    yield [dict(p.specs) for p in placements]
    yield [(p.macs_per_token, p.macs_per_forward) for p in (case.plan(),)]
    yield case.variant.identity
    model, x = case.model(), case.inputs(2, 3)
    try:
        adapter = case.attach(model)
    except ll.CalibrationError as error:
        yield str(error)
        return
    yield list(adapter.sites)
    yield _bits(adapter.state_dict().values())
    if inside.has(case.variant, "advance"):
        yield from _after_steps(model, adapter, x)
    for amount in (0.1, FAR):
        with torch.no_grad():
            move(adapter, amount, case.seed)
        yield _bits(adapter.state_dict().values())
        yield _bits([adapter.penalty()])
        for training in (False, True):
            torch.manual_seed(0)
            yield _outputs_and_gradients(model.train(training), adapter, x)


def _after_steps(
    model: nn.Module, adapter: ll.Adapter, x: Tensor, steps: int = 6
) -> Iterator[list[bytes]]:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    handle = adapter.project_after(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(x).float().square().mean())
        optimizer.step()
        yield _bits(adapter.state_dict().values())
    handle.remove()
    optimizer.zero_grad()


def _outputs_and_gradients(model: nn.Module, adapter: ll.Adapter, x: Tensor) -> list[bytes]:
    y: Tensor = model(x)
    loss = y.float().square().sum()
    parameters = list(adapter.parameters())
    return _bits([y, *torch.autograd.grad(loss, parameters, materialize_grads=True)])


def _bits(tensors: Iterable[Tensor]) -> list[bytes]:
    """The tensors' bits, which compare as NaN and -0.0 do not."""
    return [bytes(t.detach().reshape(-1).view(torch.uint8).tolist()) for t in tensors]
