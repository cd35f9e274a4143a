"""Which modules are linear layers, and how to read a dense weight from each kind.

`nn.Linear` and GPT-2's `Conv1D` are known here; a plugin teaches more (entry-point group `lora_lite.layers`, named after
the root package of the layers it teaches, loaded only when a model holds a module from there).
"""

import sys
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.hookspecs import hookimpl


class LayerKind(ABC):
    """How to read one kind of linear layer, y = x Wᵀ + b. Stateless and picklable: every method is given the module."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind, and its forward is the one this kind describes."""

    @abstractmethod
    def weight(self, module: nn.Module) -> Tensor:
        """W, dense, shape (d_out, d_in). It may share memory with the module."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(d_in, d_out). To be overridden where W is costly, or is not there on the meta device."""
        d_out, d_in = self.weight(module).shape
        return d_in, d_out

    def bias(self, module: nn.Module) -> Tensor | None:
        """b, shape (d_out,), or None."""
        return getattr(module, "bias", None)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.weight(module).dtype

    def matmul(self, module: nn.Module, m: Tensor) -> Tensor:
        """M Wᵀ for M of shape (k, d_in): shape (k, d_out)."""
        return m @ self.weight(module).detach().to(m.dtype).T

    def enter(self, module: nn.Module) -> None:
        """Called when the first adapter comes to the model that holds `module`, be it for this layer or for others."""

    def exit(self, module: nn.Module) -> None:
        """Called when the last adapter has left the model; undoes `enter`."""

    @hookimpl
    def lora_lite_layer_kind(self, module: nn.Module) -> "LayerKind | None":
        """Answers pluggy: this kind, if it matches `module`."""
        return self if self.matches(module) else None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Linear(LayerKind):
    """`nn.Linear`, and subclasses that keep its forward and its weight a plain parameter. Others (quantised or parametrized
    ones, say, or torchao's, whose weight is of a class of its own) need a kind of their own.
    """

    def matches(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        plain = type(weight) is nn.Parameter or (weight is not None and is_dtensor(weight))
        return plain and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def weight(self, module: nn.Module) -> Tensor:
        return module.get_parameter("weight")


class Conv1D(LayerKind):
    """GPT-2's `Conv1D` of transformers: a linear layer whose weight is stored as (d_in, d_out)."""

    def matches(self, module: nn.Module) -> bool:
        return class_name(module) == "transformers.pytorch_utils.Conv1D"

    def weight(self, module: nn.Module) -> Tensor:
        return module.get_parameter("weight").T


BUILT_IN: tuple[LayerKind, ...] = (Linear(), Conv1D())


def looks_linear(module: nn.Module) -> bool:
    """Whether a module that no kind matches is a linear layer all the same (so that it is named, not passed over)."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear) or all(isinstance(n, int) for n in features)


def class_name(value: object) -> str:
    """Where a class is and what it is called: `torch.nn.modules.linear.Linear`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """x, from what a linear layer was called with: its only argument, which may come as a keyword."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded, without importing torch.distributed for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; collective. Any other tensor is itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
