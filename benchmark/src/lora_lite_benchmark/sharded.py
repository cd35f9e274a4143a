"""The base in shards: FSDP2, for models that one process cannot hold.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m lora_lite_benchmark run ...

The adapter goes on the whole base, which every process has in the machine's memory, and then each
process keeps its shard of every parameter on its own device. From then on, a forward, a backward,
saving and loading are work for all processes together: none of them may leave one out.

Gradients come out of a backward as the mean over the processes. So a loss is multiplied by their
number, and the gradients are those of the sum.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from lora_lite.layers import is_dtensor, whole
from torch import Tensor, nn

from lora_lite_benchmark.processes import is_sharded

__all__ = ["shard", "sharded_state", "whole_state"]


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Leave each process its shard of every parameter, on its device, if the run is sharded.

    The blocks of the model that transformers keeps in one piece are gathered one after another;
    all else is gathered for the whole of a forward. Between forwards nothing is.
    """
    if not is_sharded(accelerator):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks: Any = getattr(model, "_no_split_modules", None) or ()
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors, for which all processes must ask."""
    return _mapped(optimizer.state_dict(), lambda _parameter, value: whole(value))


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `whole_state` gave, with each tensor sharded as the parameter that it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return _mapped(state, lambda number, value: _like(value, parameters[number]))


def _mapped(state: Mapping[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimizer's `state_dict`, with every tensor of parameter i replaced by change(i, it)."""
    changed = {
        number: {
            name: change(number, value) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` sharded as `parameter`. A number, such as a count of steps, is not sharded."""
    if not is_dtensor(parameter) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
