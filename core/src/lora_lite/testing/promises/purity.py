"""What a forward reads and writes: its tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lora_lite as ll
from lora_lite.author import Variant
from lora_lite.testing import inside
from lora_lite.testing.case import Case, Tower
from lora_lite.testing.compare import all_close, all_same, differs, same
from lora_lite.testing.promise import promise, survey
from lora_lite.testing.promises.forward import plain_layer
from lora_lite.testing.settings import settings_stay
from lora_lite.testing.strategies import Refusal

DROPOUTS = ("dropout", "alpha_dropout", "dropout1d", "feature_alpha_dropout")


@promise(examples=8)
def deltas_write_nothing(case: Case) -> None:
    """`prepare` and the deltas read x, y, the tensors and the base, and write none of them; neither
    does `penalty`.

    x and y belong to the model: it may use them again, and autograd may need them. Usually broken
    by `y += ...`, `x.mul_()`, `out=`, or an in-place operation on a view of them.
    """
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, x = case.sites(model)[path], case.inputs(2, 3)
    stored = inside.stored(model.layer)
    t = inside.read(variant, site, stored)
    y = plain_layer(case)(x)
    base = {f"base {name}": value for name, value in model.state_dict().items()}
    inputs = {"x": x, "y": y, **t, **base}
    before = {name: value.detach().clone() for name, value in inputs.items()}
    with torch.no_grad():
        prepared = inside.prepared(variant, site, t)
        kept = {name: value.clone() for name, value in prepared.items()}
        for _ in range(2):
            inside.deltas(variant, site, {**t, **prepared}, x, y)
            all_same(prepared, kept, "prepared tensors after a delta")
    variant.penalty(site, stored)
    after = {name: value.detach() for name, value in inputs.items()}
    all_same(after, before, "arguments after prepare and deltas")


@promise(examples=6)
def outputs_depend_on_tensors_alone(case: Case) -> None:
    """One variant instance serves several models at once, and what a layer computes depends on its
    tensors alone: not on which model, layer or input came before, nor on a step of training. The
    same forward twice gives the same bits, in training mode with the same random state; in eval
    mode nothing random is drawn. No global setting of torch is changed.

    Usually broken by state that a method keeps on the variant, its class or its module ("the last
    norm"), and by random draws in a delta that do not look at `site.training`.
    """
    model, other = case.model(), case.but(seed=case.seed + 1).model()
    x, z = case.inputs(2, 3), case.inputs(4, 2, seed=3)
    case.trained(model)
    with settings_stay("a forward"):
        model.layer(x)
    first, learning = _output(model, x, False), _output(model, x, True)
    case.trained(other, seed=7)
    between = _output(other, x, False)
    same(_output(model, x, False), first, "a model's output after another model was run")
    for training in (False, True):
        _output(model, z, training)
        what = "a model's output after another input"
        same(_output(model, x, False), first, what)
        same(_output(model, x, True), learning, f"{what}, in training mode")
    torch.autograd.backward(model.train()(z).float().square().mean())
    same(_output(model, x, False), first, "a model's output after a backward in training mode")
    differs(between, first, "two models with other weights and other adapters")


@promise(examples=8, sizes=True)
def training_mode_adds_dropout_alone(case: Case) -> None:
    """With dropout out of the way, training mode computes the same outputs and gradients as eval
    mode.

    What is trained is what is used. Usually broken by a delta that scales, clips, detaches or
    caches by `site.training`. A method that draws its noise in a way of its own, instead of by
    `torch.nn.functional.dropout`, is not asked.
    """
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(2, case.tokens)
    adapter = case.trained(model, dtype=torch.float64)
    expected = _outputs_and_gradients(model.eval(), adapter, x)
    before = torch.get_rng_state()
    with WithoutDropout():
        found = _outputs_and_gradients(model.train(), adapter, x)
    if torch.equal(torch.get_rng_state(), before):
        all_close(found, expected, "in training mode without dropout, against eval mode")


@promise(examples=4)
def path_is_not_read_in_a_forward(case: Case) -> None:
    """`prepare` and the deltas do not read `site.path`.

    A compiler would build one graph for each layer, and an adapter would not fit the same layer
    under another name. Usually broken by a dictionary of layers on the variant: what differs
    between layers belongs into a tensor, or into a field that `specialize` sets.
    """
    model = case.model()
    adapter = case.trained(model, layers=0)
    path, variant = next(iter(adapter.sites.items()))
    site, x = case.sites(model)[path], case.inputs(2, 3)
    values = inside.stored(model.layer)
    y, hidden = plain_layer(case)(x), inside.nameless(site)
    for training in (False, True):
        model.train(training)
        t = inside.read(variant, site, values)
        t.update(inside.prepared(variant, hidden, t))
        inside.deltas(variant, hidden, t, x, y)


@survey(examples=16)
def every_tensor_is_read(variant: type[Variant], attempts: Sequence[Case | Refusal]) -> None:
    """Every tensor that a variant declares has a use: for some fields and shapes at least,
    `prepare`, a delta, `penalty`, `project`, `advance` or a `state_dict` of its own reads it.

    A tensor that nothing reads takes up memory, and room in every file. Usually broken by a tensor
    that was left over, or that was meant to be used.
    """
    declared: set[str] = set()
    seen: set[str] = set()
    for case in attempts:
        if isinstance(case, Case):
            names, read = _tensors_read(case)
            declared |= names
            seen |= read
    unread = sorted(declared - seen)
    assert not unread, f"{variant.name!r} declares {unread}, and nothing reads them"


def draws_in_training(case: Case, model: Tower) -> bool:
    """Whether an adapted model draws random numbers in training mode, as dropout does."""
    training, before = model.training, torch.get_rng_state()
    with torch.no_grad():
        model.train()(case.inputs(2, 3))
    drew = not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    model.train(training)
    return drew


@torch.no_grad()
def _output(model: Tower, x: Tensor, training: bool) -> Tensor:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    y: Tensor = model.train(training)(x)
    if not training:
        same(torch.get_rng_state(), before, "the global random state after a forward in eval mode")
    model.eval()
    return y


def _outputs_and_gradients(model: nn.Module, adapter: ll.Adapter, x: Tensor) -> dict[str, Tensor]:
    given = x.clone().requires_grad_()
    y = model(given)
    named = {"x": given, **dict(adapter.named_parameters())}
    found = torch.autograd.grad(y.square().sum(), list(named.values()), materialize_grads=True)
    gradients = {f"gradient by {name}": g for name, g in zip(named, found, strict=True)}
    return {"output": y.detach(), **gradients}


class WithoutDropout(TorchFunctionMode):
    """torch's own dropout, by whatever name it was imported, does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function; dropout gives back its input."""
        kwargs = kwargs or {}
        if func.__name__ in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _tensors_read(case: Case) -> tuple[set[str], set[str]]:
    """The names that are declared at the first layer, and those that any method looks up."""
    model = case.model()
    adapter = case.trained(model)
    path, variant = next(iter(adapter.sites.items()))
    site, layer, x = case.sites(model)[path], model.get_submodule(path), case.inputs(2, 3)
    stored = inside.stored(layer)
    y, seen = case.model().get_submodule(path)(x), set()
    for training in (False, True):
        layer.train(training)
        t = inside.WatchedTensors(inside.read(variant, site, stored))
        prepared = inside.prepared(variant, site, t)
        seen |= t.seen
        t = inside.WatchedTensors({**dict.copy(t), **prepared})
        inside.deltas(variant, site, t, x, y)
        seen |= t.seen
    t = inside.WatchedTensors(stored)
    variant.penalty(site, t)
    layer(x).square().sum().backward()
    with torch.no_grad():
        variant.project(site, t)
        for step in (1, inside.LATE):
            variant.advance({site.path: site}, {site.path: t}, step)
    if inside.has(variant, "state_dict"):
        variant.state_dict(site, t)
    clock = {"step"} if inside.has(variant, "advance") else set()  # the core reads it
    return set(stored), seen | t.seen | clock
