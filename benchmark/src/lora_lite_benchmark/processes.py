"""What several processes, started by `accelerate launch`, do together.

With a single process, each function here does the plain thing. Every process holds the whole model
and all data, and takes its rows of every batch. The gradients of the adapter are summed after the
last backward of a step. The model therefore needs no wrapper, and a parameter that gets no gradient
in one of the processes is not a special case. Only the main process reads and writes files, so the
processes need no common file system.

Where the model is in shards (`sharded.py`), every forward, backward, save and load is work for all
processes together, and none of them may leave one out.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import lora_lite as ll
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError

__all__ = [
    "divided",
    "is_main_process",
    "is_sharded",
    "on_main",
    "refuse_unshardable",
    "same_start",
    "share",
    "stop",
    "sum_gradients",
    "together",
]

OTHERS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes.

    The launcher says so in the environment, which can be read before anything is set up.
    """
    return os.environ.get("RANK", "0") == "0"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes were launched with FSDP.

    accelerate tells so where there are accelerators. On CPUs it takes them for plain processes; the
    launcher has left its word in the environment.
    """
    if accelerator.num_processes == 1:
        return False
    return accelerator.distributed_type is DistributedType.FSDP or _told("ACCELERATE_USE_FSDP")


def share(config: RunConfig) -> Accelerator:
    """The place of this process among the processes of the run.

    Raises BenchmarkError if these processes would not train what one process trains.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    processes = accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if processes != launched:
        raise BenchmarkError(
            f"{launched} processes were launched, and accelerate sees {processes} of them",
            expected="Processes that do not know of each other would all do the same work",
            fix="Launch with --multi_gpu, also where there are only CPUs",
        )
    if accelerator.distributed_type in OTHERS:
        raise BenchmarkError(
            f"the processes were launched with {accelerator.distributed_type.value}",
            fix="Launch with --multi_gpu; or, for a base that one process cannot hold, with "
            "--use_fsdp --fsdp_version 2",
        )
    if processes > config.batch_size:
        raise BenchmarkError(
            f"{processes} processes cannot share a batch_size of {config.batch_size}",
            expected="Every process needs at least one row of each batch",
            fix="Start fewer processes, or use a larger batch_size",
        )
    if is_sharded(accelerator):
        refuse_unshardable(config)
    return accelerator


def refuse_unshardable(config: RunConfig) -> None:
    """Raises BenchmarkError if FSDP is asked for in a form, or for a row, that it is not for."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise BenchmarkError(
            "the processes were launched with FSDP1", fix="Launch with --use_fsdp --fsdp_version 2"
        )
    if _told("FSDP_OFFLOAD_PARAMS"):
        raise BenchmarkError(
            "the processes were launched with --fsdp_offload_params",
            expected="Every shard stays on its device",
            fix="Leave it out, or start more processes",
        )
    if config.quantization != "none":
        raise BenchmarkError(
            f"a base with quantization {config.quantization!r} cannot be sharded here",
            fix="Launch with --multi_gpu, or leave out --quantization",
        )
    if config.implementation == "peft":
        raise BenchmarkError(
            "PEFT writes no adapter of a base in shards",
            fix="Launch with --multi_gpu, or leave out the rows 'peft:...'",
        )


def _told(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def stop() -> None:
    """Leave the group of processes if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do `work` in the main process, and return what it returns in every process.

    If it raises an error, every process raises one: the main process the error itself, the others a
    BenchmarkError that quotes it.
    """
    if accelerator.num_processes == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    message: str | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = error
            message = f"the main process failed with {type(error).__name__}: {error}"
    result, message = broadcast_object_list([result, message])
    if message is not None:
        raise failure or BenchmarkError(message)
    return result


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do `work` in every process if the model is in shards, and else in the main one alone.

    Every process gets what it returns, once all are done.
    """
    if not is_sharded(accelerator):
        return on_main(accelerator, work)
    found = work()
    accelerator.wait_for_everyone()
    return found


def divided(
    batches: Sequence[list[int]],
    work: Callable[[list[int]], Sequence[T]],
    accelerator: Accelerator,
    title: str,
) -> list[T]:
    """What `work` gives for each row, in the order of the rows, in every process.

    Each process works on its share of the batches, and then all exchange what they found.
    """
    own = batches[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, T]] = []
    for rows in tqdm(own, desc=title, leave=False, disable=not accelerator.is_main_process):
        found += zip(rows, work(rows), strict=True)
    others_have_one_more = len(own) * accelerator.num_processes < len(batches)
    if others_have_one_more and is_sharded(accelerator):
        work(batches[0])
    return [value for _, value in sorted(gather_object(found), key=lambda pair: pair[0])]


def same_start(adapter: object, accelerator: Accelerator) -> None:
    """Give the adapter of every process the tensors of the main one.

    The last bits of a decomposition may differ from machine to machine.
    """
    if accelerator.num_processes == 1 or not isinstance(adapter, ll.Adapter):
        return
    state = on_main(
        accelerator, lambda: {key: tensor.cpu() for key, tensor in adapter.state_dict().items()}
    )
    adapter.load_state_dict(state)


@torch.no_grad()
def sum_gradients(
    loss: float, parameters: Sequence[nn.Parameter], accelerator: Accelerator
) -> float:
    """Add up the losses and every parameter's gradient over the processes; return the loss.

    One message holds all of it: the loss, for each parameter whether it has a gradient, and the
    gradients. A parameter that has no gradient in any process keeps none. Of a model in shards,
    the backward has added up the gradients.
    """
    if accelerator.num_processes == 1:
        return loss
    if is_sharded(accelerator):
        return float(accelerator.reduce(torch.tensor(loss, device=accelerator.device), "sum"))
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    head = torch.tensor([loss, *has_gradient], device=accelerator.device)
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in parameters
    ]
    message = torch.cat([head, *(gradient.flatten().float() for gradient in gradients)])
    summed = accelerator.reduce(message, "sum")
    head, *parts = summed.split([len(head), *(parameter.numel() for parameter in parameters)])
    for parameter, present, part in zip(parameters, head[1:].tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if present else None
    return float(head[0])
