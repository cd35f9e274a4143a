"""The forward delta: what the adapted layer computes, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lora_lite.testing.case import Case
from lora_lite.testing.compare import all_same, close, differs, same
from lora_lite.testing.promise import promise
from lora_lite.variant import Site, Tensors, Variant


@promise(examples=15)
def output_is_of_the_bases_kind(case: Case) -> None:
    """The adapted layer's output has the base's dtype, device and shape, for bases in float32, bfloat16 and float64, and
    whatever dtype the adapter's parameters are kept in. Its gradients are finite and have the parameters' dtypes.

    Usually broken by a float32 constant or buffer that raises a bfloat16 activation to float32, by a tensor made with
    torch.zeros(...) without `dtype` and `device`, or by a float64 number from numpy.
    """
    for kept in (torch.float32, torch.bfloat16):
        layer, x = _layer(case, dtype=kept), case.inputs(2, 3)
        base = _plain(case)(x)
        y = layer(x)
        got, expected = (y.dtype, y.device, y.shape), (base.dtype, base.device, base.shape)
        assert got == expected, (
            f"output of the adapted layer: {got}, of the base: {expected} (parameters in {kept})"
        )
        assert bool(torch.isfinite(y).all()), f"output is not finite: {y}"
        y.float().square().mean().backward()
        for name, p in layer.named_parameters():
            if p.grad is not None:
                assert p.grad.dtype == p.dtype, f"{name} is {p.dtype}, its gradient {p.grad.dtype}"
                assert bool(torch.isfinite(p.grad).all()), (
                    f"the gradient of {name} is not finite: {p.grad}"
                )


@promise(examples=10)
def gradients_agree_with_finite_differences(case: Case) -> None:
    """In float64, the gradients of the adapted layer by its input and by every parameter are those of finite differences,
    with the prepared tensors that `detached` names held constant; and the hooked layer computes what the methods say.

    A wrong gradient trains, only worse, and nobody notices. Usually broken by `.detach()`, `.data`, `.item()` or no_grad on
    something that depends on a parameter or on x (then list it in `detached`), or by a custom autograd function.
    """
    case = case.but(dtype=torch.float64)
    model = case.model()
    adapter = case.trained(model, dtype=torch.float64, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, x = case.sites(model)[path], case.inputs(2, 2).requires_grad_()
    stored = {name: p for name, p in model.layer.named_parameters() if name.startswith("lora_")}
    trainable = [name for name, p in stored.items() if p.requires_grad]
    values = [stored[name].detach().double().requires_grad_() for name in trainable]

    def tensors(*parameters: Tensor) -> dict[str, Tensor]:
        now = {**stored, **dict(zip(trainable, parameters, strict=True))}
        return {
            name.removeprefix("lora_default_"): _cast(t, torch.float64) for name, t in now.items()
        }

    with torch.no_grad():
        t = tensors(*values)
        held = {
            name: value
            for name, value in _prepared(variant, site, t).items()
            if name in variant.detached
        }
        moved = _prepared(variant, site, tensors(*(1.1 * value + 0.1 for value in values)))
    for name, value in held.items():
        assert not torch.equal(moved[name], value), (
            f"{name} is listed in `detached`, yet it depends on no parameter"
        )

    def by_methods(x: Tensor, *parameters: Tensor) -> Tensor:
        t = tensors(*parameters)
        return _forward(variant, site, {**t, **_prepared(variant, site, t), **held}, x)

    def by_hooks(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = functional_call(
            model.layer, dict(zip(trainable, parameters, strict=True)), (x,)
        )
        return y

    close(
        by_hooks(x, *values),
        by_methods(x, *values),
        "the hooked layer against prepare and deltas, called by hand",
    )
    weights = case.but(d_in=site.d_out).inputs(2, 2, seed=5)
    names = ["x", *trainable]
    hooked, plain = (
        _gradients(by_hooks, x, values, weights),
        _gradients(by_methods, x, values, weights),
    )
    for name, one, other in zip(names, hooked, plain, strict=True):
        close(one, other, f"gradient by {name} of the hooked layer, against that of the methods")
    _check_gradients(by_methods, x, values, names)


@promise(examples=10)
def batch_is_its_rows_and_sequence_its_tokens(case: Case) -> None:
    """Every token's output depends on this token alone: a batch gives what its rows give one by one, a sequence what its
    tokens give; and x may have any number of leading dimensions.

    Generation, padding and batching rely on it. Usually broken by a mean, norm or softmax over the wrong dimension, by a
    transpose or reshape that is right for three dimensions only, or by `x.T`.
    """
    case = case.but(dtype=torch.float64)
    layer, x = _layer(case, dtype=torch.float64), case.inputs(3, 4)
    with torch.no_grad():
        whole = layer(x)
        close(torch.stack([layer(row) for row in x]), whole, "rows one by one, against the batch")
        close(
            torch.cat([layer(x[:, i : i + 1]) for i in range(4)], 1),
            whole,
            "tokens one by one, against the sequence",
        )
        close(
            layer(x.reshape(-1, case.d_in)).reshape(whole.shape),
            whole,
            "x of two dimensions, against three",
        )
        close(layer(x[0, 0]), whole[0, 0], "x of one dimension, against three")
        close(layer(x[None]), whole[None], "x of four dimensions, against three")
        if case.kind == "Linear":  # Conv1D itself takes contiguous x alone
            close(
                layer(x.transpose(0, 1)).transpose(0, 1), whole, "x with swapped leading dimensions"
            )


@promise(examples=8)
def empty_batch_gives_empty_output(case: Case) -> None:
    """A batch of no rows, and a sequence of no tokens, give an empty output and zero gradients.

    Routed experts and the last shard of a data set produce them. Usually broken by max(), min() or mean() over the batch, or
    by a reshape with -1.
    """
    layer = _layer(case)
    for shape in ((0,), (0, 3), (2, 0)):
        x = case.inputs(*shape)
        y = layer(x)
        got, expected = (y.shape, y.dtype), (torch.Size([*shape, case.d_out]), case.dtype)
        assert got == expected, f"x of {list(x.shape)} gave {got}, expected {expected}"
        y.sum().backward()


@promise(examples=8)
def bias_goes_through(case: Case) -> None:
    """Where x is zero, the adapted layer gives its bias b, as the base does; a method whose formula scales, turns or shifts b
    says so with `acts_on_bias = True`, and does change it.

    Most formulas change W alone. Usually broken by a delta that is computed from y = W x + b where the formula means W x:
    then subtract `site.bias()` first, where `site.has_bias`.
    """
    case = case.but(dtype=torch.float64, bias=True)
    layer, plain = _layer(case, dtype=torch.float64), _plain(case)
    x = torch.zeros(2, 3, case.d_in, dtype=torch.float64)
    with torch.no_grad():
        if case.variant.acts_on_bias:
            differs(
                layer(x), plain(x), "acts_on_bias is True; the output at x = 0, against the bias"
            )
        else:
            close(
                layer(x), plain(x), "acts_on_bias is False; the output at x = 0, against the bias"
            )


@promise(examples=6)
def computes_where_its_tensors_are(case: Case) -> None:
    """`prepare` and the deltas compute on the device of their arguments, and give results there. The meta device stands for
    another one.

    A method that is written on one machine runs on another. Usually broken by a constant that is made at import, by
    torch.zeros(...) or torch.arange(...) without `device`, or by `.cpu()`, `.item()` and numpy.
    """
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    t = {
        name: value.to("meta")
        for name, value in _read(variant, case.sites(model)[path], model.layer).items()
    }
    x, y = case.inputs(2, 3).to("meta"), case.but(d_in=case.d_out).inputs(2, 3).to("meta")
    site = case.sites(model.to("meta"))[path]
    with torch.no_grad():
        prepared = _prepared(variant, site, t)
        deltas = _deltas(variant, site, {**t, **prepared}, x, y)
    found = {**prepared, "Δx": deltas[0], "Δy": deltas[1]}
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
    """Under bfloat16 autocast a float32 base gives what the base gives there in dtype, the adapter's output up to bfloat16
    rounding, and gradients in the parameters' own dtype.

    Usually broken by mixing tensors of two dtypes in an operation that autocast does not cast (einsum does, addcmul and
    in-place ones do not).
    """
    case = case.but(dtype=torch.float32)
    layer, plain, x = _layer(case), _plain(case), case.inputs(2, 3)
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


@promise(examples=8)
def macs_are_as_declared(case: Case) -> None:
    """`macs_per_token` and `macs_per_forward` are exact: the slope and the intercept, over the number of tokens, of the matrix
    products that torch's FlopCounterMode counts on an adapted layer beyond the base's.

    They are columns of the table by which methods are compared. Usually broken by forgetting one of two factors, or what
    `prepare` computes; a product that is made once a forward but in a delta belongs into `prepare`.
    """
    case = case.but(dtype=torch.float32)
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, tokens = case.sites(model)[path], 16

    def macs(count: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as adapted:
            model.layer(case.inputs(count))
        with torch.no_grad(), adapter.disabled(), FlopCounterMode(display=False) as base:
            model.layer(case.inputs(count))
        return int(adapted.get_total_flops() - base.get_total_flops()) // 2

    once, twice = macs(tokens), macs(2 * tokens)
    slope, intercept = (twice - once) / tokens, 2 * once - twice
    declared = (variant.macs_per_token(site), variant.macs_per_forward(site))
    assert declared == (slope, intercept), (
        f"declared (a token, a forward): {declared}; counted: {(slope, intercept)}, from {once} MACs for {tokens} tokens and "
        f"{twice} for {2 * tokens}"
    )


@promise(examples=8)
def deltas_write_nothing(case: Case) -> None:
    """`prepare` and the deltas read x, y, the tensors and the base, and write none of them; neither does `penalty`.

    x and y belong to the model: it may use them again, and autograd may need them. Usually broken by `y += ...`, `x.mul_()`,
    `out=`, or an in-place operation on a view of them.
    """
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, x = case.sites(model)[path], case.inputs(2, 3)
    t = _read(variant, site, model.layer)
    y = _plain(case)(x)
    inputs = {"x": x, "y": y, **t, **{f"base {k}": v for k, v in model.state_dict().items()}}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    with torch.no_grad():
        prepared = _prepared(variant, site, t)
        kept = {name: value.clone() for name, value in prepared.items()}
        for _ in range(2):
            _deltas(variant, site, {**t, **prepared}, x, y)
            all_same(prepared, kept, "prepared tensors after a delta")
    variant.penalty(site, t)
    all_same(
        {name: value.detach() for name, value in inputs.items()},
        before,
        "arguments after prepare and deltas",
    )


@promise(examples=6)
def outputs_depend_on_tensors_alone(case: Case) -> None:
    """One variant instance serves several models at once, and what a layer computes depends on its tensors alone: not on which
    model, site or input came before. The same forward twice gives the same bits.

    Usually broken by state that a method keeps on the variant, its class or its module ("the last norm"), and by random
    draws in a delta that do not look at `site.training`.
    """
    model, other = case.model(), case.but(seed=case.seed + 1).model()
    x = case.inputs(2, 3)
    with torch.no_grad():
        case.trained(model)
        first = model(x)
        case.trained(other, seed=7)
        between = other(x)
        same(model(x), first, "a model's output after another model with the same variant was run")
        model(case.inputs(4, 2, seed=3))
        same(model(x), first, "a model's output after another input")
        differs(between, first, "two models with other weights and other adapters")


def _layer(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The first layer of a model, with a trained adapter on it. (The layer's hooks hold what they need.)"""
    model = case.model()
    case.trained(model, layers=0, dtype=dtype)
    return model.layer


def _plain(case: Case) -> nn.Module:
    """The same layer without."""
    layer = case.model().layer
    return layer.requires_grad_(False)


def _read(variant: Variant, site: Site, layer: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors as its deltas get them: cast as `TensorSpec.compute` says."""
    dtypes = {"activation": site.dtype, "float32": torch.promote_types(site.dtype, torch.float32)}
    specs = variant.tensors(site)
    return {
        name: _cast(layer.get_parameter(f"lora_default_{name}"), dtypes[spec.compute])
        for name, spec in specs.items()
    }


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _prepared(variant: Variant, site: Site, t: Tensors) -> dict[str, Tensor]:
    return variant.prepare(site, t, **_scale(variant))


def _deltas(
    variant: Variant, site: Site, t: Tensors, x: Tensor, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(Δx, Δy), None where the variant has no such delta."""
    cls = type(variant)
    before = (
        variant.delta_input(site, t, x, **_scale(variant))
        if cls.delta_input is not Variant.delta_input
        else None
    )
    after = (
        variant.delta_output(site, t, x, y, **_scale(variant))
        if cls.delta_output is not Variant.delta_output
        else None
    )
    return before, after


def _forward(variant: Variant, site: Site, t: Tensors, x: Tensor) -> Tensor:
    """W x' + b + Δy with x' = x + Δx, from the methods alone."""
    cls, scale = type(variant), _scale(variant)
    if cls.delta_input is not Variant.delta_input:
        x = x + variant.delta_input(site, t, x, **scale)
    y = nn.functional.linear(x, site.weight(), site.bias() if site.has_bias else None)
    if cls.delta_output is not Variant.delta_output:
        y = y + variant.delta_output(site, t, x, y, **scale)
    return y


def _scale(variant: Variant) -> dict[str, float]:
    return {"scale": 1.0} if variant.takes_scale else {}


def _gradients(
    function: Callable[..., Tensor], x: Tensor, values: list[Tensor], weights: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        (function(x, *values) * weights).sum(), [x, *values], materialize_grads=True
    )


def _check_gradients(
    function: Callable[..., Tensor], x: Tensor, values: list[Tensor], names: list[str]
) -> None:
    for index, name in enumerate(names):
        inputs = [x.detach(), *(value.detach() for value in values)]
        inputs[index] = inputs[index].clone().requires_grad_()
        try:
            torch.autograd.gradcheck(function, inputs, atol=1e-5, rtol=1e-4)
        except RuntimeError as error:
            raise AssertionError(
                f"the gradient by {name} disagrees with finite differences: {error}"
            ) from None
