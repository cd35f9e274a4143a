"""Modules without a weight matrix, such as norms: adapted only by parameters in place of theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_lite.errors import AdapterError, LayerKindError
from lora_lite.layers import LayerKind, class_name, tensor_of


@dataclass(frozen=True)
class WholeModule(LayerKind):
    """A module that is called with whatever it takes, and gives one tensor.

    Attributes:
        names: of its own parameters, without those of adapters and of modules inside it.
    """

    default: ClassVar[bool] = False
    has_matrix: ClassVar[bool] = False
    forms_rows: ClassVar[bool] = False

    names: tuple[str, ...]

    def matches(self, module: nn.Module) -> bool:
        return all(module._parameters.get(name) is not None for name in self.names)

    def weight(self, module: nn.Module) -> Tensor:
        raise LayerKindError(f"{class_name(module)} has no weight matrix")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(1, n) for n numbers in its parameters, which are one column."""
        return 1, sum(parameter.numel() for parameter in self.parameters(module).values())

    def bias(self, module: nn.Module) -> Tensor | None:
        """None: a parameter called bias is one of `parameters`."""
        return None

    def dtype(self, module: nn.Module) -> torch.dtype:
        """That of its first parameter."""
        return tensor_of(module, self.names[0]).dtype

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Its own parameters, by name."""
        return {name: tensor_of(module, name) for name in self.names}

    def rows_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        return cast(Tensor, Arguments(args, kwargs))

    def to_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor):
            raise AdapterError(
                f"{class_name(module)} returns {type(y).__name__}",
                expected="Only a module that returns one tensor can be adapted as a whole",
                fix="Leave it out with exclude=",
            )
        return y

    def output(self, module: nn.Module, x: object, parameters: Mapping[str, Tensor]) -> Tensor:
        """What the module's forward gives with some parameters in place of its own.

        The forward runs on a twin that shares everything else with the module. So the module's
        hooks do not run again, and other threads see nothing of it. Buffers are copies, as batch
        normalisation writes them.

        Args:
            module: the layer.
            x: what `rows_of` gave.
            parameters: by name; cast to the dtype of those that they stand for.
        """
        assert isinstance(x, Arguments)
        own = self.parameters(module)
        replaced = {
            name: parameters[name].to(own[name].dtype) for name in own if name in parameters
        }
        buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__["_parameters"] = {**module._parameters, **replaced}
        twin.__dict__["_buffers"] = buffers
        return cast(Tensor, _forward_of(module)(twin, *x.args, **x.kwargs))


def _forward_of(module: nn.Module) -> Callable[..., object]:
    """The module's forward as a function of the module.

    Tools that give a module a forward of its own, such as kernels and accelerate, bind it to this
    one module: a twin would run with the module's own parameters.
    """
    own = module.__dict__.get("forward")
    return own.__func__ if isinstance(own, MethodType) else type(module).forward


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a module was called with, in place of x."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
