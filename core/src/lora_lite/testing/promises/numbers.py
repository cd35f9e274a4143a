"""Numbers at the edge: zeros, large activations, half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing import inside
from lora_lite.testing.case import LARGE, Case, Tower, move
from lora_lite.testing.compare import finite
from lora_lite.testing.promise import promise

# A few tokens of real models have one activation in the thousands, a massive activation (Sun et al.
# 2024, arXiv:2402.17762). In float16 its square is infinite.
TYPICAL, MASSIVE = 20.0, 1000.0
# Of the change that an adapter makes: what bfloat16 may lose of it on a well-conditioned weight.
LOST = 0.25
# The change of a token is not taken for smaller than this share of what it is at others.
SMALLEST_SHARE = 0.02


@promise(examples=8)
def zeros_give_finite_numbers(case: Case) -> None:
    """A token that is zero, and a base with a row and a column of zeros, give finite outputs and
    finite gradients, at the start and after it.

    Padding is embedded as zeros, and pruning leaves rows of zeros. Usually broken by a division by
    a norm, or by its root, whose gradient at 0 is infinite: use clamp_min on the norm, or on the
    sum of squares below a root.
    """
    for emptied in (False, True):
        model = case.model()
        if emptied:
            _empty_a_row_and_a_column(case, model)
        try:
            adapter = case.attach(model)
        except ll.CalibrationError:
            continue  # the data may span too little of a base with a rank below its size
        where = "a base with a row of zeros" if emptied else "a token that is zero"
        for moved in (False, True):
            if moved:
                move(adapter, 0.1, case.seed)
            x = case.inputs(2, 3)
            x[0, 1] = 0
            x.requires_grad_()
            for path in adapter.sites:
                _finite_through(model.get_submodule(path), x, where)


@promise(examples=6)
def large_activations_stay_finite(case: Case) -> None:
    """If x has one massive activation, of a thousand, the adapted layer gives a finite output, in
    float16 and float32, and finite gradients in float32; at the start and after it, for the default
    of every number among the fields. In float16 the change is still that of float64, to three
    quarters at least.

    Usually broken in float16 by squares, sums of squares or a division by small singular values,
    and anywhere by exp(): keep the tensors in `compute="float32"`, and use log_softmax, softplus or
    expm1 with a limit.
    """
    shape = LARGE["wide" if case.d_in > case.d_out else "tall"]
    case = case.but(d_in=shape[0], d_out=shape[1])
    usual = case.at_defaults() or case.with_fields()
    if usual is None:
        return
    x = TYPICAL * usual.but(dtype=torch.float16).inputs(2, 3)
    x[0, 1, 2] = MASSIVE
    for dtype in (torch.float16, torch.float32):
        model = usual.but(dtype=dtype).model()
        adapter = usual.but(dtype=dtype).attach(model)
        given = x.to(dtype).requires_grad_(dtype == torch.float32)
        for moved in (False, True):
            if moved:
                move(adapter, 0.1, case.seed)
            for path in adapter.sites:
                what = f"an activation of {MASSIVE:g} in {dtype}"
                _finite_through(model.get_submodule(path), given, what)
    _check_the_change(usual, x, amount=0.1)


@promise(examples=6)
def half_precision_keeps_the_change(case: Case) -> None:
    """In bfloat16, on a well-conditioned weight, the change that a trained adapter makes is that of
    float64, to three quarters at least.

    Usually broken by a delta that computes the whole new output and subtracts y, which leaves y's
    rounding in place of the change, or by 1 + g in bfloat16, which loses any g below 0.004.
    """
    _check_the_change(case, case.but(dtype=torch.bfloat16).inputs(8, 4), amount=0.02)


def _check_the_change(case: Case, x: Tensor, amount: float) -> None:
    """The deltas in x's dtype, against those in float64, from the same rounded weights."""
    model = case.but(dtype=torch.float64).model()
    adapter = case.but(dtype=torch.float64).trained(
        model, amount=amount, layers=0, dtype=torch.float64
    )
    path, variant = next(iter(adapter.sites.items()))
    stored = inside.stored(model.get_submodule(path))
    values = {name: value.detach().clone() for name, value in stored.items()}
    adapter.detach()
    changes = []
    for dtype in (torch.float64, x.dtype):
        model = model.to(x.dtype).to(dtype)
        site, given = case.sites(model)[path], x.to(dtype)
        with torch.no_grad():
            y = model.get_submodule(path)(given)
            changes.append(inside.all_deltas(variant, site, values, given, y))
    for exact, rounded in zip(*changes, strict=True):
        # Each token for itself, unless the layer may be so small that a change is 0 by chance.
        dims = (-1,) if x.dtype == torch.float16 else None
        error = torch.linalg.vector_norm(rounded.double() - exact, dim=dims)
        size = torch.linalg.vector_norm(exact, dim=dims)
        if dims:
            # A change of low rank is as good as 0 at some tokens, and its rounding is not.
            of_input = torch.linalg.vector_norm(x.double(), dim=dims)
            size = size.maximum(SMALLEST_SHARE * of_input * (size / of_input).max())
        lost = float((error / size.clamp_min(1e-12)).max())
        assert lost <= LOST, (
            f"in {x.dtype} the change is off by {lost:.0%} of its size, against float64"
        )


def _empty_a_row_and_a_column(case: Case, model: Tower) -> None:
    with torch.no_grad():
        for path in case.sites(model):
            weight = model.get_submodule(path).get_parameter("weight")
            weight[1] = 0
            weight[:, 2] = 0


def _finite_through(layer: nn.Module, x: Tensor, what: str) -> None:
    """One forward, and a backward if x requires a gradient."""
    y = layer(x)
    finite(y.detach(), f"the output for {what}")
    if not x.requires_grad:
        return
    inputs = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y.float().mean(), list(inputs.values()), materialize_grads=True)
    for name, gradient in zip(inputs, found, strict=True):
        finite(gradient, f"the gradient by {name} for {what}")
