"""Training: what learns, and what is kept in bounds."""

from __future__ import annotations

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.testing.case import Case, Tower, move
from lora_lite.testing.compare import all_same, close
from lora_lite.testing.promise import promise

STEPS = 3


@promise(examples=10)
def every_parameter_learns_and_nothing_else(case: Case) -> None:
    """Within three steps from the start, a finite and non-zero gradient reaches each of the adapter's parameters and moves it.
    No base parameter gets a gradient.

    Usually broken by two factors that both start at zero, by a parameter that no delta reads, by `.data` or `.detach()` on the
    way, or by a clamp at whose edge the method starts.
    """
    model = case.model().train()
    adapter = case.attach(model)
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    reached: set[str] = set()
    optimizer = torch.optim.AdamW(adapter.param_groups(weight_decay=0.0), lr=1e-2)
    adapter.project_after(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        _backward(model, case.inputs(4, 3, seed=step))
        for name, p in adapter.named_parameters():
            assert p.grad is not None, f"{name} got no gradient in step {step + 1}"
            assert bool(torch.isfinite(p.grad).all()), (
                f"the gradient of {name} is not finite in step {step + 1}: {p.grad}"
            )
            reached |= {name} if bool(p.grad.any()) else set()
        optimizer.step()
    adapted = {id(p) for p in adapter.parameters()}
    others = [
        name for name, p in model.named_parameters() if p.grad is not None and id(p) not in adapted
    ]
    assert not others, f"these are not the adapter's parameters and got a gradient: {others}"
    unreached = sorted(start.keys() - reached)
    assert not unreached, (
        f"the gradient is exactly zero in each of the first {STEPS} steps for {unreached}"
    )
    unmoved = [name for name, p in adapter.named_parameters() if torch.equal(p, start[name])]
    assert not unmoved, f"after {STEPS} steps of AdamW these are what they were: {unmoved}"


@promise(examples=5, shrink=False)
def learns_what_it_can_express(case: Case) -> None:
    """A short training run fits a target that the method can express: the same variant on the same layer, with other values of
    its parameters. At one of three learning rates at least, the mean square error falls below a third.

    Usually broken by a wrong sign, by a gradient that is too small by orders of magnitude, by a projection that undoes the
    steps, or by a start from which no gradient leads away.
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
    raise AssertionError(f"in 80 steps of Adam, the mean square error fell {told}")


@promise(examples=8)
def project_and_penalty_are_sound(case: Case) -> None:
    """The start is in the allowed set, so `project` does not move it; projecting twice is projecting once, in place; and
    `penalty`, where a method has one, is a finite scalar that has a gradient.

    Usually broken by a projection that rescales a little each time, by one that puts a new tensor into `t` and leaves the
    parameter as it was, or by a penalty per row that was not summed.
    """
    model = case.model()
    adapter = case.attach(model)
    start = _values(adapter)
    adapter.project()
    for name, value in _values(adapter).items():
        close(value, start[name], f"{name}: project at the start")
    move(adapter, 0.5, case.seed)
    once = _values(adapter)
    adapter.project()
    for name, value in _values(adapter).items():
        close(value, once[name], f"{name}: project, once more")
    for path, variant in adapter.sites.items():
        layer = model.get_submodule(path)
        t = {
            name: layer.get_parameter(f"lora_default_{name}")
            for name in variant.tensors(case.sites(model)[path])
        }
        given = dict(t)
        with torch.no_grad():
            variant.project(case.sites(model)[path], given)
        replaced = [name for name in t if given.get(name) is not t[name]]
        assert not replaced, (
            f"project puts other tensors under {replaced}; a parameter changes in place alone, as by clamp_()"
        )
        penalty = variant.penalty(case.sites(model)[path], t)
        if penalty is not None:
            assert not penalty.ndim, (
                f"the penalty has shape {list(penalty.shape)}, expected a scalar"
            )
            assert bool(torch.isfinite(penalty)), f"the penalty is {penalty}"
            gradients = torch.autograd.grad(
                penalty, [p for p in t.values() if p.requires_grad], allow_unused=True
            )
            assert any(g is not None and bool(g.any()) for g in gradients), (
                f"the penalty {float(penalty)} has no gradient"
            )


@promise(examples=6)
def accumulated_gradients_add_up(case: Case) -> None:
    """The gradient of a batch is the sum of its rows' gradients, so gradient accumulation and data parallelism are right.

    Usually broken by state that a forward leaves for the next one, by something that looks at the whole batch, or by a
    graph that is kept from one step to the next (backward then fails the second time).
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
        close(
            _gradient(p),
            whole[name],
            f"{name}: gradients of the rows, added up, against the batch's",
        )


@promise(examples=4)
def checks_clean(case: Case) -> None:
    """`ll.check` finds nothing wrong: every hook fires, every parameter of a slightly moved adapter gets a gradient; and it
    leaves everything as it was.

    Usually broken by a parameter whose gradient vanishes away from the start (a clamp), or by a `prepare` that fails in
    training mode.
    """
    model = case.model().train()
    adapter = case.attach(model)
    before = _values(adapter)
    ll.check(model, case.inputs(8, 16))  # many, or dropout leaves none
    all_same(_values(adapter), before, "parameters after ll.check")


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
    adapter.project_after(optimizer)
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
