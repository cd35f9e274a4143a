"""`check`: does every hook run, does every parameter get a gradient?

1. Perturb the adapters a little: at their start, half of the parameters have no gradient yet.
2. Run one forward and one backward, and count the calls of every adapted layer.
3. Judge what is seen, and say what is wrong in words. Everything is put back as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lite.adapter import Adapter
from lora_lite.attaching import adapters
from lora_lite.calibration import call, describe_batch
from lora_lite.errors import AdapterError, CheckError

PERTURBATION = 1e-2

REENTRANT_CHECKPOINTING = (
    "gradient checkpointing is on: in its reentrant form it drops the gradients of a block whose "
    "input needs none. Turn it on with {'use_reentrant': False} as its keyword arguments, or call "
    "model.enable_input_require_grads()"
)


class Report(NamedTuple):
    """What `check` found to be in order.

    Attributes:
        adapters: the names of the checked adapters.
        sites: the number of adapted layers, each of which was called.
        parameters: the number of trainable tensors, each of which got a finite gradient that is not
            zero.
    """

    adapters: tuple[str, ...]
    sites: int
    parameters: int

    def __str__(self) -> str:
        names = ", ".join(self.adapters)
        return (
            f"{names}: {self.sites} layers were called, {self.parameters} parameters got a finite, "
            "non-zero gradient"
        )


def check(model: nn.Module, batch: Any) -> Report:
    """One forward and backward on `batch`, with the adapters slightly perturbed.

    The loss is the output's `loss`, if it has one, else the mean square of its first floating-point
    tensor. Parameters, gradients, buffers and random state are put back afterwards.

    Args:
        model: with adapters; in the mode (train, eval, gradient checkpointing) to be checked.
        batch: what the model is called with: a mapping (keywords), a tuple or list (positions), or
            one argument.

    Raises:
        AdapterError: the model has no adapter, or a layer of one was replaced.
        CheckError: what is wrong, in words: layers never called, parameters without a gradient, and
            the likely reason.
    """
    found = adapters(model)
    if not found:
        raise AdapterError("the model has no adapter to check", fix="Attach or load one first")
    parameters = {
        f"{adapter.name}: {name}": parameter
        for adapter in found.values()
        for name, parameter in adapter.named_parameters()
        if parameter.requires_grad
    }
    if not parameters:
        raise CheckError(
            "no adapter parameter requires a gradient",
            fix="Was requires_grad_(False) called on the whole model? Turn it on for "
            "adapter.parameters()",
        )
    layers = _layers(found.values())
    with _restored(model, parameters.values(), found.values()):
        model.zero_grad(set_to_none=True)
        _perturb(parameters.values())
        with _counted(layers) as called:
            loss = _loss(call(model, batch, next(model.parameters()).device), batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        wrong = list(_judge(model, found, layers, called, parameters, loss))
    if wrong:
        raise CheckError(
            f"{len(wrong)} things are wrong",
            details=wrong,
            fix="Layers that the model never calls can be left out with exclude="
            if len(called) < len(layers)
            else "",
            layer=next((path for path in layers if path not in called), ""),
        )
    return Report(tuple(found), len(layers), len(parameters))


def _layers(found: Iterable[Adapter]) -> dict[str, nn.Module]:
    """The adapted layers by path."""
    return {path: module for adapter in found for path, module in adapter._modules.items()}


# --- before and after


@contextmanager
def _restored(
    model: nn.Module, trained: Iterable[nn.Parameter], found: Iterable[Adapter]
) -> Iterator[None]:
    """Put parameters, gradients, buffers and random state back as they are now."""
    states = [adapter._state for adapter in found]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        for parameter in model.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
        for parameter in trained:
            stack.callback(parameter.data.copy_, parameter.detach().clone())
        for name, buffer in model.named_buffers():
            stack.callback(_restore_buffer, model, name, buffer.clone())
        for state in states:
            stack.callback(setattr, state, "was_trained", state.was_trained)
            state.was_trained = True  # this forward is not a training one, and is judged here
        yield


@torch.no_grad()
def _restore_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    buffer = model.get_buffer(name)
    if not torch.equal(buffer, value):
        buffer.copy_(value)


def _perturb(parameters: Iterable[nn.Parameter]) -> None:
    # `.data`, since torch shall not count this as a change by training.
    rng = torch.Generator().manual_seed(0)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=rng).to(parameter)
        parameter.data.add_(PERTURBATION * noise)


# --- during


@contextmanager
def _counted(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The paths of the layers that are called meanwhile."""
    called: set[str] = set()
    with ExitStack() as stack:
        for path, module in layers.items():
            handle = module.register_forward_hook(lambda *_, path=path: called.add(path))
            stack.callback(handle.remove)
        yield called


def _loss(output: Any, batch: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = dict(output) if isinstance(output, Mapping) else output
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float().square().mean()
    raise CheckError(
        f"the model gives no floating-point tensor for this batch ({describe_batch(batch)})",
        expected="The loss is the output's `loss`, or made of its first floating-point tensor",
    )


# --- the verdict


def _judge(
    model: nn.Module,
    found: Mapping[str, Adapter],
    layers: Mapping[str, nn.Module],
    called: set[str],
    parameters: Mapping[str, nn.Parameter],
    loss: Tensor,
) -> Iterator[str]:
    """What is wrong, one line each."""
    if not torch.is_grad_enabled():
        yield "gradients are off (torch.no_grad or inference_mode around check)"
        return
    for name, adapter in found.items():
        if not adapter._state.is_active or adapter.scale == 0:
            yield f"adapter {name!r} is disabled or has scale 0"
    for path in layers:
        if path not in called:
            yield f"{path}: the layer was never called, so its hooks never ran"
    if not loss.requires_grad:
        yield "the loss does not depend on any adapter parameter"
    missing = any(parameter.grad is None for parameter in parameters.values())
    if missing and _checkpoints(model):
        yield REENTRANT_CHECKPOINTING
    if loss.requires_grad:
        for name, parameter in parameters.items():
            problem = _bad_gradient(parameter.grad)
            if problem:
                yield f"{name}: {problem}"


def _bad_gradient(gradient: Tensor | None) -> str:
    if gradient is None:
        return "no gradient"
    if not gradient.isfinite().all():
        return "the gradient is not finite"
    if not gradient.any():
        return "the gradient is zero"
    return ""


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
