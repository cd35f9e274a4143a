"""Training: what learns, and what is kept in bounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.author import Site, Variant
from lora_lite.shared import is_shared
from lora_lite.testing import inside
from lora_lite.testing.case import Case, Tower, move
from lora_lite.testing.compare import NoEffectError, all_same, close, finite
from lora_lite.testing.promise import promise
from lora_lite.testing.promises.purity import draws_in_training

STEPS = 3
# Points around the start at which every entry of every tensor is looked at.
PLACES = (0.05, 0.2, 0.5, 1.0)
# How often more of them are looked at, for methods that choose a few entries at a time.
MOST_ROUNDS = 25


@promise(examples=10)
def every_parameter_learns_and_nothing_else(case: Case) -> None:
    """Within three steps from the start, a finite and non-zero gradient reaches each of the
    adapter's parameters and moves it. No base parameter gets a gradient.

    Usually broken by two factors that both start at zero, by a parameter that no delta reads, by
    `.data` or `.detach()` on the way, or by a clamp at whose edge the method starts.
    """
    model = case.model()
    adapter = case.attach(model)
    # Dropout of a whole rank may leave no gradient for some steps.
    model.train(not draws_in_training(case, model))
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    reached: set[str] = set()
    optimizer = torch.optim.AdamW(adapter.param_groups(weight_decay=0.0), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: adapter.project())  # a schedule may stop some
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        _backward(model, case.inputs(4, 3, seed=step - 1))
        for name, p in adapter.named_parameters():
            assert p.grad is not None, f"{name} got no gradient in step {step}"
            finite(p.grad, f"the gradient of {name} in step {step}")
            if bool(p.grad.any()):
                reached.add(name)
        optimizer.step()
    adapted = {id(p) for p in adapter.parameters()}
    others = [
        name for name, p in model.named_parameters() if p.grad is not None and id(p) not in adapted
    ]
    assert not others, f"these are not the adapter's parameters and got a gradient: {others}"
    unreached = sorted(start.keys() - reached)
    if unreached:
        raise NoEffectError(
            f"the gradient is exactly zero in each of the first {STEPS} steps for {unreached}"
        )
    unmoved = [name for name, p in adapter.named_parameters() if torch.equal(p, start[name])]
    assert not unmoved, f"after {STEPS} steps of AdamW these are what they were: {unmoved}"


@promise(examples=10, sizes=True)
def every_entry_can_learn(case: Case) -> None:
    """Around the start there is a place where the gradient of an entry is not zero, for every entry
    of every trainable tensor. The diagonal and one triangle of square blocks are not asked, which
    skew and triangular matrices leave out.

    An entry that never learns is counted as a parameter and does nothing. Usually broken by rank //
    2, pairs of an odd number of features, or the last part of a division that leaves a rest.
    """
    case = case.but(dtype=torch.float64)
    model = case.model()
    adapter = case.attach(model, dtype=torch.float64)
    start = _values(adapter)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in start.items()}
    for index, amount in enumerate(PLACES * MOST_ROUNDS):
        if index >= len(PLACES) and all(bool(where.all()) for where in reached.values()):
            break
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                p.copy_(start[name])
        move(adapter, amount, case.seed + index)
        for path in adapter.sites:
            y = model.get_submodule(path)(case.inputs(32, seed=index))
            parameters = {
                name: parameter
                for name, parameter in adapter.named_parameters()
                if name.startswith(f"{path}.") or is_shared(name)
            }
            loss = (y * torch.linspace(-1, 1, case.d_out, dtype=y.dtype) + y.square()).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for name, gradient in zip(parameters, found, strict=True):
                reached[name] |= gradient != 0
    dead = {
        name: (~where).nonzero().tolist()[:3]
        for name, where in reached.items()
        if bool((~where & ~_left_out_of_a_matrix(where)).any())
    }
    if dead:
        raise NoEffectError(
            f"these entries have no gradient at any of {len(PLACES) * MOST_ROUNDS} places around "
            f"the start, the first of each tensor being: {dead}"
        )


@promise(examples=5, shrink=False)
def learns_what_it_can_express(case: Case) -> None:
    """A short training run fits a target that the method can express: the same variant on the same
    layer, with other values of its parameters. At one of three learning rates at least, the mean
    square error falls below a third.

    Usually broken by a wrong sign, by a gradient that is too small by orders of magnitude, by a
    projection that undoes the steps, or by a start from which no gradient leads away.
    """
    case = case.but(dtype=torch.float32)
    x, teacher = case.inputs(32), case.model()
    case.trained(teacher, seed=1, layers=0)
    with torch.no_grad():
        target = teacher.layer(x)
    runs = {}
    for lr in (2e-2, 1e-1, 4e-3):
        runs[lr] = _fit(case, x, target, lr)
        if runs[lr][-1] < runs[lr][0] / 3:
            return
    told = ", ".join(
        f"from {losses[0]:.3g} to {min(losses):.3g} at lr {lr}" for lr, losses in runs.items()
    )
    failure = NoEffectError if all(losses[0] == 0 for losses in runs.values()) else AssertionError
    raise failure(f"in 80 steps of Adam, the mean square error fell {told}")


@promise(examples=8)
def project_and_penalty_are_sound(case: Case) -> None:
    """The start is in the allowed set, so `project` does not move it; projecting twice is
    projecting once, and gives the same every time; it changes the parameters themselves, in place.
    `penalty`, where a method has one, is a finite scalar that has a finite gradient.

    Usually broken by a projection that rescales a little each time, by one that puts a new tensor
    into `t` or writes to `.data` (autograd and `frozen()` do not see that), by a random draw, or by
    a penalty per row that was not summed.
    """
    model = case.model()
    adapter = case.attach(model)
    start = _values(adapter)
    _check_penalty(case, model, adapter, is_start=True)
    adapter.project()
    for name, value in _values(adapter).items():
        close(value, start[name], f"{name}: project at the start")
    _check_that_project_is_in_place(case, model, adapter)
    move(adapter, 0.5, case.seed)
    once = _values(adapter)
    adapter.project()
    for name, value in _values(adapter).items():
        close(value, once[name], f"{name}: project, once more")
    _check_penalty(case, model, adapter, is_start=False)


@promise(examples=6)
def accumulated_gradients_add_up(case: Case) -> None:
    """The gradient of a batch is the sum of its rows' gradients, so gradient accumulation and data
    parallelism are right.

    Usually broken by state that a forward leaves for the next one, by something that looks at the
    whole batch, or by a graph that is kept from one step to the next (backward then fails the
    second time).
    """
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(3, 2)
    adapter = case.trained(model, dtype=torch.float64)
    _backward(model, x)
    whole = {name: _gradient(p) for name, p in adapter.named_parameters()}
    for p in adapter.parameters():
        p.grad = None
    for row in x:
        _backward(model, row[None])
    for name, p in adapter.named_parameters():
        what = f"{name}: gradients of the rows, added up, against the batch's"
        close(_gradient(p), whole[name], what)


@promise(examples=4)
def checks_clean(case: Case) -> None:
    """`ll.check` finds nothing wrong: every hook fires, every parameter of a slightly moved adapter
    gets a gradient; and it leaves everything as it was.

    Usually broken by a parameter whose gradient vanishes away from the start (a clamp), or by a
    `prepare` that fails in training mode.
    """
    model = case.model()
    adapter = case.attach(model)
    model.train(not draws_in_training(case, model))
    before = _values(adapter)
    try:
        ll.check(model, case.inputs(8, 16))
    except ll.CheckError as error:
        raise NoEffectError(str(error)) from error
    all_same(_values(adapter), before, "parameters after ll.check")


def _left_out_of_a_matrix(reached: Tensor) -> Tensor:
    """The entries that a skew or triangular matrix leaves out, if these are what was not reached.

    Args:
        reached: bool, of any shape; a square in its last two dimensions may hold such matrices.
    """
    nothing = torch.zeros_like(reached)
    if reached.ndim < 2 or reached.shape[-1] != reached.shape[-2] or reached.shape[-1] == 1:
        return nothing
    everything = torch.ones_like(reached)
    diagonal = torch.eye(reached.shape[-1], dtype=torch.bool).expand_as(reached)
    upper, lower = torch.triu(everything), torch.tril(everything)
    for left_out in (diagonal, upper & ~diagonal, lower & ~diagonal, upper, lower):
        if torch.equal(~reached, left_out):
            return left_out
    return nothing


def _check_that_project_is_in_place(case: Case, model: Tower, adapter: ll.Adapter) -> None:
    """At places far outside the allowed set, so that there is something to project."""
    for index, amount in enumerate((0.5, 5.0)):
        parameters = dict(adapter.named_parameters())
        rng = torch.Generator().manual_seed(case.seed + index)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(amount * torch.randn(p.shape, generator=rng).to(p))
        outside = _values(adapter)
        facts = {name: (p.data_ptr(), p._version) for name, p in parameters.items()}
        adapter.project()
        for name, p in parameters.items():
            place, version = facts[name]
            assert p.data_ptr() == place, f"project gives {name} new memory; change it in place"
            assert p._version > version or torch.equal(p, outside[name]), (
                f"project writes to {name}.data, which autograd and frozen() do not see; change "
                "the tensor itself, as by clamp_()"
            )
        projected = _values(adapter)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(outside[name])
        torch.manual_seed(index + 1)
        adapter.project()
        all_same(_values(adapter), projected, "projecting the same values again")
        for path, variant in adapter.sites.items():
            site = case.sites(model)[path]
            t = dict(inside.stored(model.get_submodule(path)))
            _check_that_project_keeps_tensors(variant, site, t)


def _check_that_project_keeps_tensors(
    variant: Variant, site: Site, t: Mapping[str, Tensor]
) -> None:
    given = dict(t)
    with torch.no_grad():
        variant.project(site, given)
    replaced = [name for name in t if given.get(name) is not t[name]]
    assert not replaced, (
        f"project puts other tensors under {replaced}; a parameter changes in place alone, as by "
        "clamp_()"
    )


def _check_penalty(case: Case, model: Tower, adapter: ll.Adapter, *, is_start: bool) -> None:
    for path, variant in adapter.sites.items():
        site = case.sites(model)[path]
        t = inside.stored(model.get_submodule(path))
        penalty = variant.penalty(site, dict(t))
        if penalty is None:
            continue
        assert not penalty.ndim, f"the penalty has shape {list(penalty.shape)}, expected a scalar"
        finite(penalty, "the penalty")
        learning = [p for p in t.values() if p.requires_grad]
        assert penalty.requires_grad, f"the penalty {float(penalty)} has no gradient"
        found = torch.autograd.grad(penalty, learning, materialize_grads=True)
        for gradient in found:
            finite(gradient, "the gradient of the penalty")
        if not is_start and not any(bool(gradient.any()) for gradient in found):
            raise NoEffectError(f"the penalty {float(penalty)} has no gradient")


def _backward(model: Tower, x: Tensor) -> None:
    """Of a loss that is a sum over tokens."""
    out: Tensor = model(x).double()
    torch.autograd.backward((out * torch.linspace(-1, 1, x.shape[-1]) + out.square()).sum())


def _values(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _fit(case: Case, x: Tensor, target: Tensor, lr: float) -> list[float]:
    """The errors of a run, up to 80 steps or a fifth of the first error."""
    student = case.model()
    adapter = case.attach(student, layers=0)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    optimizer.register_step_post_hook(lambda *_: adapter.project())
    losses: list[float] = []
    while len(losses) < 80:
        optimizer.zero_grad()
        loss = (student.layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        if losses[-1] < losses[0] / 5:
            break
        torch.autograd.backward(loss)
        optimizer.step()
    return losses
