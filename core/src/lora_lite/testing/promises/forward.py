"""The forward delta: dtype, device and shape of what the adapted layer computes."""

from __future__ import annotations

import torch
from torch import nn

from lora_lite.testing import inside
from lora_lite.testing.case import Case
from lora_lite.testing.compare import close, differs, finite
from lora_lite.testing.promise import promise

# A context that a fixed buffer or a limit in a delta is likely to be shorter than.
MANY_TOKENS = 1100


@promise(examples=15)
def output_is_of_the_bases_kind(case: Case) -> None:
    """The adapted layer's output has the base's dtype, device and shape, for bases in float32,
    bfloat16 and float64, and whatever dtype the adapter's parameters are kept in. Its gradients are
    finite and have the parameters' dtypes.

    Usually broken by a float32 constant or buffer that raises a bfloat16 activation to float32, by
    a tensor made with torch.zeros(...) without `dtype` and `device`, or by a float64 number from
    numpy.
    """
    for kept in (torch.float32, torch.bfloat16):
        layer, x = adapted_layer(case, dtype=kept), case.inputs(2, 3)
        base = plain_layer(case)(x)
        y = layer(x)
        got, expected = (y.dtype, y.device, y.shape), (base.dtype, base.device, base.shape)
        assert got == expected, (
            f"output of the adapted layer: {got}, of the base: {expected} (parameters in {kept})"
        )
        finite(y, "the output")
        y.float().square().mean().backward()
        for name, p in layer.named_parameters():
            if p.grad is not None:
                assert p.grad.dtype == p.dtype, f"{name} is {p.dtype}, its gradient {p.grad.dtype}"
                finite(p.grad, f"the gradient of {name}")


@promise(examples=10, sizes=True)
def batch_is_its_rows_and_sequence_its_tokens(case: Case) -> None:
    """Every token's output depends on this token alone: a batch gives what its rows give one by
    one, a sequence what its tokens give; and x may have any number of leading dimensions.

    Generation, padding and batching rely on it. Usually broken by a mean, norm or softmax over the
    wrong dimension, by a transpose or reshape that is right for three dimensions only, or by `x.T`.
    """
    case = case.but(dtype=torch.float64)
    layer, x = adapted_layer(case, dtype=torch.float64), case.inputs(3, case.tokens)
    with torch.no_grad():
        whole = layer(x)
        rows = torch.stack([layer(row) for row in x])
        close(rows, whole, "rows one by one, against the batch")
        tokens = torch.cat([layer(x[:, i : i + 1]) for i in range(x.shape[1])], 1)
        close(tokens, whole, "tokens one by one, against the sequence")
        flat = layer(x.reshape(-1, case.d_in)).reshape(whole.shape)
        close(flat, whole, "x of two dimensions, against three")
        close(layer(x[0, 0]), whole[0, 0], "x of one dimension, against three")
        close(layer(x[:1, :1]), whole[:1, :1], "one token of one row, against the batch")
        close(layer(x[None]), whole[None], "x of four dimensions, against three")
        if case.kind == "Linear":  # Conv1D itself takes contiguous x alone
            swapped = layer(x.transpose(0, 1)).transpose(0, 1)
            close(swapped, whole, "x with swapped leading dimensions")
        long = case.inputs(1, MANY_TOKENS, seed=5)
        tail = layer(long)[:, -case.tokens :]
        close(tail, layer(long[:, -case.tokens :]), f"the end of {MANY_TOKENS} tokens, alone")


@promise(examples=8)
def empty_batch_gives_empty_output(case: Case) -> None:
    """A batch of no rows, and a sequence of no tokens, give an empty output and zero gradients.

    Routed experts and the last shard of a data set produce them. Usually broken by max(), min() or
    mean() over the batch, or by a reshape with -1.
    """
    layer = adapted_layer(case)
    for shape in ((0,), (0, 3), (2, 0)):
        x = case.inputs(*shape)
        y = layer(x)
        got, expected = (y.shape, y.dtype), (torch.Size([*shape, case.d_out]), case.dtype)
        assert got == expected, f"x of {list(x.shape)} gave {got}, expected {expected}"
        y.sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is None or not p.grad.any(), (
                f"x of {list(x.shape)} gave {name} a gradient that is not zero: {p.grad}"
            )


@promise(examples=8, sizes=True)
def bias_goes_through(case: Case) -> None:
    """Where x is zero, the adapted layer gives its bias b, as the base does; a method whose formula
    scales, turns or shifts b says so with `acts_on_bias = True`, and does change it.

    Most formulas change W alone. Usually broken by a delta that is computed from y = W x + b where
    the formula means W x: then subtract `site.bias()` first, if `site.has_bias`.
    """
    case = case.but(dtype=torch.float64, bias=True)
    layer, plain = adapted_layer(case, dtype=torch.float64), plain_layer(case)
    x = torch.zeros(2, 3, case.d_in, dtype=torch.float64)
    what = f"acts_on_bias is {case.variant.acts_on_bias}; the output at x = 0, against the bias"
    with torch.no_grad():
        if case.variant.acts_on_bias:
            differs(layer(x), plain(x), what)
        else:
            close(layer(x), plain(x), what)


@promise(examples=6)
def computes_where_its_tensors_are(case: Case) -> None:
    """`prepare` and the deltas compute on the device of their arguments, and give results there.
    The meta device stands for another one.

    A method that is written on one machine runs on another. Usually broken by a constant that is
    made at import, by torch.zeros(...) or torch.arange(...) without `device`, or by `.cpu()`,
    `.item()` and numpy.
    """
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site = case.sites(model)[path]
    read = inside.read(variant, site, inside.stored(model.layer))
    t = {name: value.to("meta") for name, value in read.items()}
    x, y = case.inputs(2, 3).to("meta"), case.but(d_in=case.d_out).inputs(2, 3).to("meta")
    site = case.sites(model.to("meta"))[path]
    with torch.no_grad():
        prepared = inside.prepared(variant, site, t)
        before, after = inside.deltas(variant, site, {**t, **prepared}, x, y)
    found = {**prepared, "Δx": before, "Δy": after}
    elsewhere = {
        name: str(value.device)
        for name, value in found.items()
        if value is not None and not value.is_meta
    }
    assert not elsewhere, (
        f"of arguments on the device meta, these were computed elsewhere: {elsewhere}"
    )


@promise(examples=8)
def works_under_autocast(case: Case) -> None:
    """Under bfloat16 autocast a float32 base gives what the base gives there in dtype, the
    adapter's output up to bfloat16 rounding, and gradients in the parameters' own dtype.

    Usually broken by mixing tensors of two dtypes in an operation that autocast does not cast
    (einsum does, addcmul and in-place ones do not).
    """
    case = case.but(dtype=torch.float32)
    layer, plain, x = adapted_layer(case), plain_layer(case), case.inputs(2, 3)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), plain(x)
    got, wanted = (y.dtype, y.shape), (base.dtype, base.shape)
    assert got == wanted, f"under autocast the adapted layer gives {got}, the base {wanted}"
    close(y.detach().float(), expected, "under autocast, against float32", tolerance=0.1)
    y.float().square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad is None or p.grad.dtype == p.dtype, (
            f"{name} is {p.dtype}, its gradient under autocast {p.grad.dtype}"
        )


def adapted_layer(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The first layer of a model, with a trained adapter on it, whose hooks hold what they need."""
    model = case.model()
    case.trained(model, layers=0, dtype=dtype)
    return model.layer


def plain_layer(case: Case) -> nn.Module:
    """The same layer without."""
    return case.model().layer.requires_grad_(False)
