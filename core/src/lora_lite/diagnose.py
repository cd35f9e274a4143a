"""`check`: does every hook fire, does every parameter get a gradient?"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lite.adapter import adapters
from lora_lite.calibration import call, describe
from lora_lite.errors import AdapterError, CheckError, bullets


class Report(NamedTuple):
    """What `check` found to be in order.

    Attributes:
        adapters: the names of the checked adapters.
        sites: hooked layers, each of which was called.
        parameters: trainable tensors, each of which got a finite gradient that is not zero.
    """

    adapters: tuple[str, ...]
    sites: int
    parameters: int

    def __str__(self) -> str:
        names = ", ".join(self.adapters)
        return f"{names}: {self.sites} layers were called, {self.parameters} parameters got a finite, non-zero gradient"


def check(model: nn.Module, batch: Any) -> Report:
    """One forward and backward on `batch`, with the adapters slightly perturbed; everything is restored afterwards.

    The loss is the output's `loss`, where it has one, else the mean square of its first floating-point tensor.

    Args:
        model: with adapters; in the mode (train, eval, gradient checkpointing) to be checked.
        batch: what the model is called with: a mapping (keywords), a tuple or list (positions), or one argument.

    Raises:
        AdapterError: the model has no adapter.
        CheckError: what is wrong, in words: layers never called, parameters without a gradient, and the likely reason.
    """
    found = adapters(model)
    if not found:
        raise AdapterError("check: the model has no adapter; attach or load one first")
    parameters = {
        f"{a.name}: {n}": p
        for a in found.values()
        for n, p in a.named_parameters()
        if p.requires_grad
    }
    modules = {path: module for a in found.values() for path, module in a._modules.items()}
    if not parameters:
        raise CheckError(
            "no adapter parameter requires a gradient; was requires_grad_(False) called on the whole model?"
        )
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        _restore_later(stack, model, parameters.values())
        model.zero_grad(set_to_none=True)
        for path, module in modules.items():
            stack.callback(
                module.register_forward_hook(lambda *_, path=path: calls.update((path,))).remove
            )
        _perturb(parameters.values())
        loss = _loss(call(model, batch, next(model.parameters()).device), batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            off = [name for name, a in found.items() if not (a._control.enabled and a.scale)]
            wrong = [f"adapter {name!r} is disabled or has scale 0" for name in off]
            wrong += [
                f"{path}: the layer was never called, so its hooks never fired"
                for path in modules
                if not calls[path]
            ]
            wrong += _bad_gradients(parameters, model)
        elif torch.is_grad_enabled():
            wrong = ["the loss does not depend on any adapter parameter", *_checkpointing(model)]
        else:
            wrong = ["gradients are off (torch.no_grad or inference_mode around check)"]
    if wrong:
        raise CheckError(f"{len(wrong)} things are wrong:{bullets(wrong)}")
    return Report(tuple(found), len(modules), len(parameters))


def _restore_later(stack: ExitStack, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Put parameters, buffers, gradients and random state back as they are now, when `stack` is left."""
    stack.enter_context(torch.random.fork_rng())
    for p in model.parameters():
        stack.callback(setattr, p, "grad", p.grad)
    for p in trained:
        stack.callback(p.data.copy_, p.detach().clone())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stack.callback(lambda: [model.get_buffer(name).copy_(value) for name, value in buffers.items()])


def _perturb(parameters: Iterable[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(1e-2 * torch.randn(p.shape, generator=generator).to(p))


def _loss(output: Any, batch: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [
        value
        for value in tree_leaves(output)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not tensors:
        raise CheckError(
            f"the model gives no floating-point tensor for this batch ({describe(batch)})"
        )
    return tensors[0].float().square().mean()


def _bad_gradients(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> list[str]:
    missing = [f"{name}: no gradient" for name, p in parameters.items() if p.grad is None]
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    broken = [
        f"{name}: the gradient is not finite"
        for name, gradient in found.items()
        if not gradient.isfinite().all()
    ]
    zero = [
        f"{name}: the gradient is zero" for name, gradient in found.items() if not gradient.any()
    ]
    return (_checkpointing(model) if missing else []) + missing + broken + zero


def _checkpointing(model: nn.Module) -> list[str]:
    told = (
        "gradient checkpointing is on: in its reentrant form it drops the gradients of a block whose input needs none. Turn it "
        "on with {'use_reentrant': False} as its keyword arguments, or call model.enable_input_require_grads()"
    )
    return (
        [told]
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        else []
    )
