"""Scale, disabled, frozen, several adapters."""

from __future__ import annotations

import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import Case, Tower, move
from lora_lite.testing.compare import close, differs, finite, same
from lora_lite.testing.inside import has_both_deltas
from lora_lite.testing.promise import promise


@promise(examples=10, sizes=True)
def scale_fades_from_base_to_adapter(case: Case) -> None:
    """A disabled adapter, and one at scale 0, are the base bit for bit; scale 1 is the adapter; in
    between, a delta is scaled, unless the method takes the scale itself. Scales of -1 and 2 give
    finite outputs.

    Usually broken, in a `ScaledVariant`, by a formula that leaves rounding at scale 0 (write R - I
    as one expression that is 0 there), by a method that ignores `scale`, or by a root or logarithm
    of the scale.
    """
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(2, case.tokens)
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
        if not case.variant.takes_scale and not has_both_deltas(case.variant):
            close(half, (plain + layer) / 2, "scale 0.5, against the mean of base and adapter")
        for scale in (-1.0, 2.0):
            adapter.scale = scale
            finite(adapted(x), f"the output at scale {scale:g}")
        adapter.scale = 1.0
        same(model(x), full, "scale 1 again, against the adapter")


@promise(examples=8)
def adapters_add_up_in_any_order(case: Case) -> None:
    """Two adapters on one model add their deltas, and the sum does not depend on the order of
    attachment, to the bit.

    Usually broken by a delta that computes the whole new output instead of the difference, or by
    values that are initialised from an output that another adapter has changed already.
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
        if not has_both_deltas(case.variant):
            sum_of_both = (a - base) + (b - base)
            close(y - base, sum_of_both, "the change by both, against the sum of each one's")
        first.detach()
        same(layer(x), b, "after detaching one, against the other alone")


@promise(examples=8)
def frozen_changes_nothing(case: Case) -> None:
    """Under `adapter.frozen()` the outputs are the same bits as without, also for another input, at
    another scale, in inference mode and with gradients; with and without gradients they agree up to
    rounding; and after it, changed parameters count again.

    Usually broken by a `prepare` that depends on the input, on the mode, or on anything else than
    the tensors.
    """
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    other = case.inputs(3, 2, seed=4)
    # A forward with gradients may round otherwise than one without (torch.matmul folds its
    # arguments in another way), so each is compared with its like.
    learning = model(x).detach()
    with torch.no_grad():
        expected, expected_other = model(x), model(other)
        close(learning, expected, "with gradients, against without")
        with adapter.frozen():
            for _ in range(2):
                same(model(x), expected, "frozen, against not")
            same(model(other), expected_other, "frozen with another input, against not")
            adapter.scale = 0.0
            model(x)
            adapter.scale = 1.0
            same(model(x), expected, "frozen after another scale, against not")
            with torch.inference_mode():
                same(model(x), expected, "frozen in inference mode, against not")
            with torch.enable_grad():
                same(model(x).detach(), learning, "frozen with gradients, against not")
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
