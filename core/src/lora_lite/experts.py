"""The experts of a mixture that are kept as one parameter of three dimensions.

transformers keeps all experts of a block in two parameters of one module, `gate_up_proj` and
`down_proj`, of shape (experts, d_out, d_in) or (experts, d_in, d_out). No module computes what one
expert does, so hooks alone do not reach it; `stand_in` says how an adapter does. Each of these
parameters is a layer here: its path is that of the parameter, its sizes are those of one expert,
and its tensors are stacked, (experts, ...).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.layers import LayerKind

# What transformers calls the parameters that hold all experts.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
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

    Only modules that say how their weights lie (`is_transposed`): those of transformers do.
    """
    is_transposed: Any = module.__dict__.get("is_transposed")
    if not isinstance(is_transposed, bool):
        return {}
    return {
        name: ExpertStack(name, is_transposed)
        for name in PARAMETERS
        if _holds_experts(module._parameters.get(name))
    }


def _holds_experts(parameter: Tensor | None) -> bool:
    return (
        parameter is not None
        and parameter.ndim == 3
        and parameter.is_floating_point()
        and parameter.element_size() > 1  # float8 is multiplied by kernels of its own
    )


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Past the stand-in, which is there during a forward."""
    parameter = module._parameters[name]
    assert isinstance(parameter, torch.Tensor)
    return parameter
