"""Gradients: those of finite differences, and the hooks against the methods called by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lite.testing import inside
from lora_lite.testing.case import LARGE_TOKENS, Case
from lora_lite.testing.compare import close
from lora_lite.testing.promise import promise

Function = Callable[..., Tensor]


@promise(examples=10, sizes=True)
def gradients_agree_with_finite_differences(case: Case) -> None:
    """In float64, the gradients of the adapted layer by its input and by every parameter are those
    of finite differences, with the prepared tensors that `detached` names held constant; and the
    hooked layer computes what the methods say.

    A wrong gradient trains, only worse, and nobody notices. Usually broken by `.detach()`, `.data`,
    `.item()` or no_grad on something that depends on a parameter or on x (then list it in
    `detached`), or by a custom autograd function.
    """
    case = case.but(dtype=torch.float64)
    model = case.model()
    adapter = case.trained(model, dtype=torch.float64, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, x = case.sites(model)[path], case.inputs(2, case.tokens // 2).requires_grad_()
    stored = inside.stored(model.layer)
    trainable = [name for name, p in stored.items() if p.requires_grad]
    values = [stored[name].detach().double().requires_grad_() for name in trainable]
    specs, alone = variant.tensors(site), FirstLayer(model)
    places = [
        f"model.{inside.place('default', path, variant, name, specs[name])}" for name in trainable
    ]

    def tensors(*parameters: Tensor) -> dict[str, Tensor]:
        now = {**stored, **dict(zip(trainable, parameters, strict=True))}
        return inside.read(variant, site, now)

    def prepared(*parameters: Tensor) -> dict[str, Tensor]:
        found = inside.prepared(variant, site, tensors(*parameters))
        missing = sorted(set(variant.detached) - found.keys())
        assert not missing, f"`detached` names {missing}, which prepare does not return"
        return {name: found[name] for name in variant.detached}

    with torch.no_grad():
        held = prepared(*values)
        moved = prepared(*(1.1 * value + 0.1 for value in values))
    for name, value in held.items():
        assert not torch.equal(moved[name], value), (
            f"{name} is listed in `detached`, yet it depends on no parameter"
        )

    def by_methods(x: Tensor, *parameters: Tensor) -> Tensor:
        t = tensors(*parameters)
        t = {**t, **inside.prepared(variant, site, t), **held}
        return inside.forward(variant, site, t, x)

    def by_hooks(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(places, parameters, strict=True))
        y: Tensor = functional_call(alone, given, (x,))
        return y

    what = "the hooked layer against prepare and deltas, called by hand"
    close(by_hooks(x, *values), by_methods(x, *values), what)
    weights = case.but(d_in=site.d_out).inputs(*x.shape[:-1], seed=5)
    names = ["x", *trainable]
    hooked = _gradients(by_hooks, x, values, weights)
    plain = _gradients(by_methods, x, values, weights)
    for name, one, other in zip(names, hooked, plain, strict=True):
        close(one, other, f"gradient by {name} of the hooked layer, against that of the methods")
    if case.tokens == LARGE_TOKENS:
        _check_slopes(by_methods, [x, *values], names, weights, plain)
    else:
        _check_every_entry(by_methods, [x, *values], names)


class FirstLayer(nn.Module):
    """A model as its first layer alone, with what this layer shares with others in reach."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model.get_submodule("layer")(x)
        return y


def _gradients(
    function: Function, x: Tensor, values: list[Tensor], weights: Tensor
) -> tuple[Tensor, ...]:
    total = (function(x, *values) * weights).sum()
    return torch.autograd.grad(total, [x, *values], materialize_grads=True)


def _check_every_entry(function: Function, inputs: Sequence[Tensor], names: list[str]) -> None:
    for index, name in enumerate(names):
        given = [value.detach() for value in inputs]
        given[index] = given[index].clone().requires_grad_()
        try:
            torch.autograd.gradcheck(function, given, atol=1e-5, rtol=1e-4)
        except RuntimeError as error:
            raise AssertionError(
                f"the gradient by {name} disagrees with finite differences: {error}"
            ) from None


@torch.no_grad()
def _check_slopes(
    function: Function,
    inputs: Sequence[Tensor],
    names: list[str],
    weights: Tensor,
    gradients: Sequence[Tensor],
    step: float = 1e-6,
) -> None:
    """The gradient by each input along one random direction: for layers of many entries."""
    for index, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        rng = torch.Generator().manual_seed(index)
        direction = torch.randn(gradient.shape, generator=rng, dtype=gradient.dtype)
        ends = []
        for sign in (1, -1):
            moved = [value.detach() for value in inputs]
            moved[index] = moved[index] + sign * step * direction
            ends.append((function(*moved) * weights).sum())
        slope, expected = (ends[0] - ends[1]) / (2 * step), (gradient * direction).sum()
        room = 1e-4 * float((gradient.abs() * direction.abs()).sum()) + 1e-5
        assert abs(float(slope - expected)) <= room, (
            f"the gradient by {name} along a random direction is {float(expected):.8g}, finite "
            f"differences give {float(slope):.8g}"
        )
