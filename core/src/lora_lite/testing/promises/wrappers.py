"""What PyTorch does with a model: copies, pickles, compiles, checkpoints."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.testing.case import Case, Tower, move
from lora_lite.testing.compare import all_close, close, differs, same
from lora_lite.testing.promise import promise
from lora_lite.testing.promises.purity import draws_in_training


@promise(examples=6)
def copies_are_independent(case: Case) -> None:
    """A deep copy of an adapted model computes the same bits, is found by `ll.adapters`, and shares
    nothing with the original.

    Usually broken by a closure or an attribute that holds the original's module or tensor.
    """
    model, x = case.model(), case.inputs(2, 3)
    case.trained(model)
    twin = copy.deepcopy(model)
    _is_a_copy(case, model, twin, x, "a deep copy")


@promise(examples=6)
def pickles_are_independent(case: Case) -> None:
    """A whole model with its adapter, written by torch.save and read again, computes the same bits
    and is as independent as a deep copy.

    Usually broken by lambdas, by classes that are defined in a function, and by pydantic generics.
    """
    model, x = case.model(), case.inputs(2, 3)
    case.trained(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _is_a_copy(case, model, torch.load(file, weights_only=False), x, "an unpickled model")


@promise(examples=6)
def checkpointing_changes_nothing(case: Case) -> None:
    """With non-reentrant gradient checkpointing, in training mode, outputs and gradients are the
    same.

    Checkpointing runs a forward a second time in the backward. Usually broken by a hook or delta
    that counts its calls, keeps something for the backward, or draws random numbers that are not
    torch's.
    """
    model, x = case.model().train(), case.inputs(2, 3)
    adapter = case.trained(model)
    plain = _outputs_and_gradients(model, adapter, x)
    model.checkpointing = True
    checkpointed = _outputs_and_gradients(model, adapter, x)
    all_close(checkpointed, plain, "with checkpointing, against without")


@promise(examples=2, shrink=False)
def compiles_whole_and_once(case: Case) -> None:
    """torch.compile(fullgraph=True) takes an adapted model without a graph break, in training mode
    and in eval mode, agrees with the uncompiled model in outputs and gradients, and compiles
    nothing again after optimizer steps and a swap to other values.

    Usually broken by `if` on a tensor's value, `.item()`, print, numpy, a Python number that
    changes with every step, or by a delta that reads `site.path`.
    """
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a second to import

    case = case.but(dtype=torch.float32)
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    # A compiled dropout draws other numbers than an uncompiled one.
    model.train(not draws_in_training(case, model))
    eager = _outputs_and_gradients(model, adapter, x)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            found = _outputs_and_gradients(compiled, adapter, x)
            all_close(found, eager, "compiled, against eager")
            graphs = backend.frame_count
            optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
            for _ in range(2):
                _outputs_and_gradients(compiled, adapter, x)
                optimizer.step()
                adapter.project()
            state = {name: value.clone() for name, value in adapter.state_dict().items()}
            adapter.load_state_dict(state)
            move(adapter, 0.1, 5)
            what = "compiled after a swap, against eager"
            close(compiled(x).detach(), model(x).detach(), what)
            assert backend.frame_count == graphs, (
                f"{backend.frame_count - graphs} compilations after steps and a swap"
            )
            model.eval()
            with torch.no_grad():
                close(compiled(x), model(x), "compiled in eval mode, against eager")
    finally:
        torch._dynamo.reset()


def _is_a_copy(case: Case, model: Tower, twin: Tower, x: Tensor, what: str) -> None:
    with torch.no_grad():
        expected = model(x)
        same(twin(x), expected, f"the output of {what}")
        found = ll.adapters(twin)
        assert list(found) == ["default"], f"ll.adapters of {what}: {list(found)}"
        assert list(found["default"].sites) == list(ll.adapters(model)["default"].sites), (
            f"the sites of {what} differ"
        )
        move(found["default"], 0.3, 9)
        differs(twin(x), expected, f"{what} with other parameters")
        same(model(x), expected, f"the original after {what} was changed")
        found["default"].detach()
        same(twin(x), case.model()(x), f"{what} without its adapter, against the base")
        same(model(x), expected, f"the original after {what} lost its adapter")


def _outputs_and_gradients(
    model: Callable[[Tensor], Tensor], adapter: ll.Adapter, x: Tensor
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    for p in adapter.parameters():
        p.grad = None
    y = model(x)
    torch.autograd.backward(y.float().square().mean())
    gradients = {
        f"gradient of {name}": p.grad.clone()
        for name, p in adapter.named_parameters()
        if p.grad is not None
    }
    return {"output": y.detach(), **gradients}
