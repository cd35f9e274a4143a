"""The experts of a mixture that are kept as one parameter of three dimensions.

transformers keeps all experts of a block in two parameters of one module, `gate_up_proj` and
`down_proj`, of shape (experts, d_out, d_in) or (experts, d_in, d_out). No module computes what one
expert does, so hooks alone do not reach it; `stand_in` says how an adapter does. Each of these
parameters is a layer here: its path is that of the parameter, its sizes are those of one expert,
and its tensors are stacked, (experts, ...).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.layers import LayerKind

# What transformers calls the parameters that hold all experts.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "weight")
# What configurations call the number of experts that a token goes to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")


@dataclass(frozen=True)
class ExpertStack(LayerKind):
    """All experts of one parameter.

    Attributes:
        parameter: its name in the module.
        is_transposed: whether it is (experts, d_in, d_out), and not (experts, d_out, d_in).
    """

    default: ClassVar[bool] = False

    parameter: str
    is_transposed: bool

    def matches(self, module: nn.Module) -> bool:
        return expert_stacks(module).get(self.parameter) == self

    def stacked(self, module: nn.Module) -> Tensor:
        """(experts, d_out, d_in), detached."""
        weights = _parameter(module, self.parameter).detach()
        return weights.mT if self.is_transposed else weights

    def weight(self, module: nn.Module) -> Tensor:
        """(experts · d_out, d_in): the matrices of all experts, one below the other."""
        return self.stacked(module).flatten(0, 1)

    def in_layout(self, module: nn.Module, w: Tensor) -> Tensor:
        """Other matrices, (experts, d_out, d_in), as the parameter keeps them."""
        return w.mT if self.is_transposed else w

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of one expert."""
        _, d_out, d_in = self.stacked(module).shape
        return d_in, d_out

    def count(self, module: nn.Module) -> int:
        return len(_parameter(module, self.parameter))

    def stored_weight(self, module: nn.Module) -> Tensor | None:
        return module._parameters.get(self.parameter)

    def bias(self, module: nn.Module) -> Tensor | None:
        """None: a bias of the experts is added to y after the adapters."""
        return None

    def tensor_name(self, tensor: str) -> str:
        """Apart for each parameter of the module."""
        return f"{self.parameter}_{tensor}"

    def chosen(self, module: nn.Module) -> int:
        """How many experts a token goes to; all of them where the model does not say."""
        config = getattr(module, "config", None)
        for name in CHOSEN:
            number = getattr(config, name, None)
            if isinstance(number, int):
                return number
        return self.count(module)


@dataclass(frozen=True)
class OneExpert(LayerKind):
    """One expert of a stack, as a linear layer without a bias."""

    stack: ExpertStack
    index: int

    def matches(self, module: nn.Module) -> bool:
        return self.stack.matches(module) and self.index < self.stack.count(module)

    def weight(self, module: nn.Module) -> Tensor:
        return self.stack.stacked(module)[self.index]

    def bias(self, module: nn.Module) -> Tensor | None:
        """None, as for the stack."""
        return None


class SingleMatrix(LayerKind):
    """A module that holds a `weight`, (d_out, d_in), and nothing else of the base."""

    def matches(self, module: nn.Module) -> bool:
        return False

    def weight(self, module: nn.Module) -> Tensor:
        return _parameter(module, "weight")


@dataclass(frozen=True, eq=False)
class GivenWeight(LayerKind):
    """A layer whose weight is at hand: that of one expert, where all are computed at once."""

    given: Tensor

    def matches(self, module: nn.Module) -> bool:
        return False

    def weight(self, module: nn.Module) -> Tensor:
        return self.given

    def bias(self, module: nn.Module) -> Tensor | None:
        """None, as for the stack."""
        return None


def expert_stacks(module: nn.Module) -> dict[str, ExpertStack]:
    """The parameters of a module that hold experts, by name.

    Only where it is known how their weights lie: the experts of transformers say so, or have sizes
    that show it.
    """
    known = module.__dict__
    if "is_transposed" not in known and "num_experts" not in known:
        return {}
    stacks = {}
    for name in PARAMETERS:
        parameter = module._parameters.get(name)
        if parameter is not None and _holds_experts(parameter):
            is_transposed = _is_transposed(known, name, parameter)
            if is_transposed is not None:
                stacks[name] = ExpertStack(name, is_transposed)
    return stacks


def _is_transposed(known: Mapping[str, Any], name: str, parameter: Tensor) -> bool | None:
    """Whether a parameter is (experts, d_in, d_out); None if its module does not tell.

    Args:
        known: the attributes of the module.
        name: of the parameter.
        parameter: itself.
    """
    told = known.get("is_transposed")
    if isinstance(told, bool):
        return told
    outer = known.get("hidden_size")  # of x for the first product, of y for the second one
    d_in = known.get("input_size") if name == "weight" else outer
    d_out = known.get("output_size") if name == "weight" else outer
    if name == "down_proj":
        d_in = None
    elif name != "weight":
        d_out = None
    _, rows, columns = parameter.shape
    as_linear = d_out in (None, rows) and d_in in (None, columns)
    as_transposed = d_in in (None, rows) and d_out in (None, columns)
    if (d_in is None and d_out is None) or as_linear == as_transposed:
        return None
    return as_transposed


def _holds_experts(parameter: Tensor) -> bool:
    return (
        parameter.ndim == 3
        and parameter.is_floating_point()
        and parameter.element_size() > 1  # float8 is multiplied by kernels of its own
    )


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Past the stand-in, which is there during a forward."""
    parameter = module._parameters[name]
    assert isinstance(parameter, torch.Tensor)
    return parameter
