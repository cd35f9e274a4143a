"""Scale, disabled, frozen, several adapters."""

from __future__ import annotations

import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import Case, Tower, move
from lora_lite.testing.compare import close, differs, same
from lora_lite.testing.promise import promise
from lora_lite.variant import Variant


@promise(examples=10)
def scale_fades_from_base_to_adapter(case: Case) -> None:
    """A disabled adapter, and one at scale 0, are the base bit for bit; scale 1 is the adapter; in between, a delta is scaled,
    unless the method takes the scale itself.

    Usually broken, with `takes_scale`, by a formula that leaves rounding at scale 0 (write R - I as one expression that is 0
    there), or by a method that ignores `scale`.
    """
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(2, 3)
    with torch.no_grad():
        base = model(x)
        adapter = case.trained(model, dtype=torch.float64)
        adapted = _layer(model, adapter)
        full, layer = model(x), adapted(x)
        with adapter.disabled():
            plain = adapted(x)
            same(model(x), base, "disabled, against the base")
        same(model(x), full, "enabled again, against before")
        differs(layer, plain, "the layer with a trained adapter, against the base")
        adapter.scale = 0.0
        same(model(x), base, "scale 0, against the base")
        adapter.scale = 0.5
        half = adapted(x)
        differs(half, plain, "scale 0.5, against the base")
        differs(half, layer, "scale 0.5, against the adapter")
        if _is_linear_in_scale(case):
            close(half, (plain + layer) / 2, "scale 0.5, against the mean of base and adapter")
        adapter.scale = 1.0
        same(model(x), full, "scale 1 again, against the adapter")


@promise(examples=8)
def adapters_add_up_in_any_order(case: Case) -> None:
    """Two adapters on one model add their deltas, and the sum does not depend on the order of attachment, to the bit.

    Usually broken by a delta that computes the whole new output instead of the difference, or by values that are initialised
    from an output that another adapter has changed already.
    """
    case = case.but(dtype=torch.float64)
    x = case.inputs(2, 3)
    with torch.no_grad():
        both, turned = case.model(), case.model()
        first, second = _attached(case, both, "a"), _attached(case, both, "b")
        _attached(case, turned, "b"), _attached(case, turned, "a")
        same(turned(x), both(x), "attached as b, a, against a, b")
        layer = _layer(both, first)
        y = layer(x)
        with second.disabled():
            a = layer(x)
        with first.disabled():
            b = layer(x)
            with second.disabled():
                base = layer(x)
        if not _has_both_deltas(case.variant):
            close(
                y - base,
                (a - base) + (b - base),
                "the change by both, against the sum of each one's",
            )
        first.detach()
        same(layer(x), b, "after detaching one, against the other alone")


@promise(examples=8)
def frozen_changes_nothing(case: Case) -> None:
    """Under `adapter.frozen()` the outputs are the same bits, also for another input, at another scale and with gradients; and
    after it, changed parameters count again.

    Usually broken by a `prepare` that depends on the input, on the mode, or on anything else than the tensors.
    """
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    other = case.inputs(3, 2, seed=4)
    with torch.no_grad():
        expected, expected_other = model(x), model(other)
        with adapter.frozen():
            for _ in range(2):
                same(model(x), expected, "frozen, against not")
            same(model(other), expected_other, "frozen with another input, against not")
            adapter.scale = 0.0
            model(x)
            adapter.scale = 1.0
            same(model(x), expected, "frozen after another scale, against not")
            with torch.enable_grad():
                same(model(x).detach(), expected, "frozen with gradients, against not")
        move(adapter, 0.3, case.seed + 5)
        differs(model(x), expected, "after frozen(), with other parameters")


def _layer(model: Tower, adapter: ll.Adapter) -> nn.Module:
    """The first layer that is adapted: `specialize` may have dropped one."""
    layer: nn.Module = model.get_submodule(next(iter(adapter.sites)))
    return layer


def _attached(case: Case, model: Tower, name: str) -> ll.Adapter:
    adapter = case.attach(model, name=name, dtype=torch.float64, seed=case.seed + ord(name))
    move(adapter, 0.1, ord(name))
    return adapter


def _is_linear_in_scale(case: Case) -> bool:
    return not case.variant.takes_scale and not _has_both_deltas(case.variant)


def _has_both_deltas(variant: Variant) -> bool:
    """Output deltas see the changed input: then the changes of an output do not simply add up."""
    cls = type(variant)
    return (
        cls.delta_input is not Variant.delta_input and cls.delta_output is not Variant.delta_output
    )
