"""What a kind of layer must tell: its weight as a matrix, and its inputs and outputs as rows.

Every layer here computes y = x Wᵀ + b, if one looks at it in the right way. Linear layers are known
here, convolutions and embeddings in `kinds`. A plugin teaches more: in the entry-point group
`lora_lite.layers`, named after the root package of the layers that it teaches, and loaded only when
a model holds a module from there.
"""

import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.hookspecs import hookimpl

FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"
GPT2 = "transformers.pytorch_utils.Conv1D"

# What linear layers of different packages call their sizes.
SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


class LayerKind(ABC):
    """How to read one kind of layer, y = x Wᵀ + b.

    A kind can be pickled and holds nothing of a layer: every method is given the module.

    Attributes:
        default: whether adapters go to such layers without being asked to. False for those that
            only `targets` or a recipe chooses.
        has_matrix: whether there is a W. If there is none, only variants that replace the layer's
            parameters as they are go there (`Variant.replaces_weights`).
        forms_rows: whether x is there as rows, (..., d_in). If it is not, as for a convolution,
            whose rows would be all patches of its input, `rows_of` gives `Rows`, which can be
            multiplied and nothing else; variants that change or observe x do not fit.
        reads_ids: whether x stands for token ids, as for an embedding.
    """

    default: ClassVar[bool] = True
    has_matrix: ClassVar[bool] = True
    forms_rows: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind, and its forward is the one that this kind describes."""

    @abstractmethod
    def weight(self, module: nn.Module) -> Tensor:
        """W, dense, shape (d_out, d_in). It may share memory with the module."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(d_in, d_out). Override it if W is costly, or is not there on the meta device."""
        d_out, d_in = self.weight(module).shape
        return d_in, d_out

    def bias(self, module: nn.Module) -> Tensor | None:
        """b, shape (d_out,), or None."""
        return getattr(module, "bias", None)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which the layer computes."""
        return self.weight(module).dtype

    def count(self, module: nn.Module) -> int:
        """How many matrices of this shape the layer has; 1, but for the experts of a mixture."""
        return 1

    def stored_weight(self, module: nn.Module) -> Tensor | None:
        """The parameter that holds W, if there is one."""
        return module._parameters.get("weight")

    def tensor_name(self, tensor: str) -> str:
        """What a variant's tensor is called among all those on the module."""
        return tensor

    def matmul(self, module: nn.Module, m: Tensor) -> Tensor:
        """M Wᵀ for M of shape (k, d_in): shape (k, d_out)."""
        return m @ self.weight(module).detach().to(m.dtype).T

    def rows_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """The input as rows x, (..., d_in), from what the layer was called with.

        Args:
            module: the layer.
            args: positional.
            kwargs: keywords.
            y: what `to_rows` gave.
        """
        return layer_input(args, kwargs)

    def to_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        """The layer's output as rows, (..., d_out)."""
        return y

    def from_rows(self, module: nn.Module, rows: Tensor, y: Tensor) -> Tensor:
        """Rows in the layout of the layer's output y: the inverse of `to_rows`."""
        return rows

    def enter(self, module: nn.Module) -> None:
        """Called when the first adapter comes to the model that holds `module`.

        It need not be an adapter of this layer: gradients for other layers go through this one too.
        """

    def exit(self, module: nn.Module) -> None:
        """Called when the last adapter has left the model; undoes `enter`.

        It may be called a second time, after a detach that was interrupted.
        """

    @hookimpl
    def lora_lite_layer_kind(self, module: nn.Module) -> "LayerKind | None":
        """Answers pluggy: this kind, if it matches `module`."""
        return self if self.matches(module) else None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Linear(LayerKind):
    """`nn.Linear`, and subclasses that keep its forward and have a plain parameter as weight.

    Others need a kind of their own: quantised layers, parametrized ones, and torchao's, whose
    weight is of a class of its own. Falcon's writes the same product in another way.
    """

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or not has_plain_weight(module):
            return False
        return type(module).forward is nn.Linear.forward or class_name(module) == FALCON

    def weight(self, module: nn.Module) -> Tensor:
        return tensor_of(module, "weight")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.in_features, module.out_features


class Conv1D(LayerKind):
    """GPT-2's `Conv1D` of transformers: a linear layer whose weight is stored as (d_in, d_out)."""

    def matches(self, module: nn.Module) -> bool:
        return class_name(module) == GPT2

    def weight(self, module: nn.Module) -> Tensor:
        return tensor_of(module, "weight").T


def has_plain_weight(module: nn.Module) -> bool:
    """Whether `weight` is a parameter of torch's own class: not quantised, not parametrized."""
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter or is_dtensor(weight)


def looks_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, also if no kind can read it."""
    if isinstance(module, nn.Linear):
        return True
    for names in SIZES:
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return True
    return False


def class_name(value: object) -> str:
    """Where a class is and what it is called: `torch.nn.modules.linear.Linear`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """x, from what a linear layer was called with: its only argument, which may be a keyword."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def with_input(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a linear layer was called with, with another x."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is sharded, without importing torch.distributed for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which every process must ask for. Any other tensor is itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def overwrite(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor in place; each process copies its part of a sharded one."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        values = values.to(device=target.device, dtype=target.dtype)
        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values, mesh, placements)
    target.copy_(values)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A tensor among a module's attributes, as the type checker cannot know it.

    The attribute rather than the parameter: the two differ under vmap, FSDP1 and parametrizations.
    """
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value
