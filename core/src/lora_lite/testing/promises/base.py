"""The base model: read, never written, and given back as it was."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing.case import Case
from lora_lite.testing.compare import same
from lora_lite.testing.promise import promise

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


@promise(examples=8, waivable=False)
def base_is_untouched(case: Case) -> None:
    """Through attach, training, save, load and detach no bit of the base changes; and after detach
    neither a flag, a hook, an attribute nor a key of the state dict is left.

    Removing an adapter gives back the very model. Usually broken by a method that writes into
    `site.weight()`, which may share memory with the base (`.mul_`, `.copy_`, `+=` on it or on a
    view), or by a hook or attribute that it sets by itself.
    """
    model, x = case.model(), case.inputs(2, 3)
    model.blocks[0].get_submodule("back").requires_grad_(False)
    before, output = snapshot(model), model(x).detach()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        adapter = case.attach(model)
        _unwritten(model, weights, "attach")
        _train(model, adapter, x)
        _unwritten(model, weights, "training")
        adapter.save(file)
        adapter.detach()
        again = ll.load(model, file, variant=type(case.variant))
        model(x).float().sum().backward()
        _unwritten(model, weights, "load")
    again.detach()
    after = snapshot(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags, (
        "requires_grad differs after detach"
    )
    assert after.keys() == before.keys(), (
        f"left behind: {after.keys() - before.keys()}, lost: {before.keys() - after.keys()}"
    )
    changed = [
        f"{key}: {before[key]} -> {after[key]}" for key in before if after[key] != before[key]
    ]
    assert not changed, f"after detach: {'; '.join(changed)}"
    _unwritten(model, weights, "detach")
    same(model(x).detach(), output, "the model's output after detach")


def _train(model: nn.Module, adapter: ll.Adapter, x: Tensor) -> None:
    """Two steps, with everything that a training run calls."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    adapter.project_after(optimizer)
    model.train()
    for _ in range(2):
        loss = model(x).float().square().mean() + adapter.penalty()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()


def _unwritten(model: nn.Module, weights: dict[str, Tensor], when: str) -> None:
    now = model.state_dict()
    for name, value in weights.items():
        same(now[name], value, f"base tensor {name} after {when}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What an adapter could leave a trace in, apart from the gradients that training leaves."""
    seen: dict[str, Any] = {"keys of the state dict": list(model.state_dict())}
    for path, module in model.named_modules():
        seen[f"{path}: class and mode"] = (type(module), module.training)
        seen[f"{path}: attributes"] = sorted(module.__dict__)
        seen |= {f"{path}: {hooks}": list(getattr(module, hooks)) for hooks in HOOKS}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            facts = (id(tensor), tensor._version, tensor.requires_grad, tensor.dtype)
            seen[f"{path}.{name}: identity, version, flag"] = facts
    return seen
