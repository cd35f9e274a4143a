"""Methods that act on the number of the step."""

from __future__ import annotations

import tempfile

import torch

import lora_lite as ll
from lora_lite.testing import inside
from lora_lite.testing.case import Case, Tower
from lora_lite.testing.compare import all_same
from lora_lite.testing.promise import promise


@promise(examples=6)
def schedules_resume(case: Case) -> None:
    """A method that acts on the number of the step (`advance`) does the same in every run, and goes
    on to the same bits where a run was saved and restored in the middle.

    Usually broken by a counter or a moving average that is kept in Python instead of a declared
    tensor, by random numbers of its own, or by a tensor that is replaced instead of written to.
    """
    if not inside.has(case.variant, "advance"):
        return
    whole, parts, again = case.model(), case.model(), case.model()
    adapter, first = case.attach(whole), case.attach(parts)
    places = {name: p.data_ptr() for name, p in adapter.named_parameters()}
    losses = _steps(whole, adapter, case, range(4))
    assert {name: p.data_ptr() for name, p in adapter.named_parameters()} == places, (
        "advance gives a parameter new memory; change it in place"
    )
    assert _steps(parts, first, case, range(2)) == losses[:2], "two runs differ"
    second = case.attach(again)
    with tempfile.TemporaryDirectory() as folder:
        first.save(f"{folder}/half")
        second.restore(f"{folder}/half")
    _steps(again, second, case, range(2, 4))
    all_same(second.state_dict(), adapter.state_dict(), "the tensors of a run that was resumed")


def _steps(model: Tower, adapter: ll.Adapter, case: Case, numbers: range) -> list[float]:
    """The losses of some steps of plain gradient descent, which keeps no state of its own."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    adapter.project_after(optimizer)
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        loss = model(case.inputs(2, 4, seed=number)).float().square().mean() + adapter.penalty()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
