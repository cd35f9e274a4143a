"""What several processes, started by `accelerate launch`, do together. With one process each of these does the plain thing.

Every process holds the whole model and all data, and takes its rows of every batch. Gradients of the adapter are summed after
the last backward of a step, so no wrapper is around the model, and a parameter that gets no gradient in one process is no
special case. Files are the main process's alone: no file system needs to be shared.
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

from lora_lite_benchmark.errors import BenchmarkError

__all__ = [
    "in_shards",
    "is_main_process",
    "on_main",
    "same_start",
    "share",
    "stop",
    "sum_gradients",
]

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that speaks, by what the launcher says: known before anything is started."""
    return os.environ.get("RANK", "0") == "0"


def share(batch_size: int) -> Accelerator:
    """The part of this process in a run. Raises BenchmarkError for a launch that would not train what one process trains."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise BenchmarkError(
            f"launched as {os.environ['WORLD_SIZE']} processes, of which accelerate sees {accelerator.num_processes}; they "
            "would all do the same"
        )
    if accelerator.distributed_type in SHARDED:
        raise BenchmarkError(
            f"started with {accelerator.distributed_type.value}: every process holds the whole base here; launch without it"
        )
    if accelerator.num_processes > batch_size:
        raise BenchmarkError(
            f"{accelerator.num_processes} processes cannot share a batch_size of {batch_size}; start fewer"
        )
    return accelerator


def stop() -> None:
    """Leave the group of processes, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, in every process; what it raises there is raised in every process."""
    if accelerator.num_processes == 1:
        return work()
    sent: list[T | str | None] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            sent[0] = work()
        except Exception as error:
            failure, sent[1] = error, f"in the main process: {type(error).__name__}: {error}"
    result, message = broadcast_object_list(sent)
    if message is not None:
        raise failure or BenchmarkError(message)
    return result  # type: ignore[no-any-return]


def in_shards(
    batches: Sequence[list[int]],
    work: Callable[[list[int]], Sequence[T]],
    accelerator: Accelerator,
    title: str,
) -> list[T]:
    """The values that `work` gives for batches of rows, in the order of the rows, in every process; a batch is one's work."""
    own = batches[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, T]] = []
    for rows in tqdm(own, desc=title, leave=False, disable=not accelerator.is_main_process):
        found += zip(rows, work(rows), strict=True)
    return [value for _, value in sorted(gather_object(found), key=lambda pair: pair[0])]


def same_start(adapter: object, accelerator: Accelerator) -> None:
    """Every process gets the main one's tensors: decompositions may differ in the last bits from machine to machine."""
    if accelerator.num_processes > 1 and isinstance(adapter, ll.Adapter):
        adapter.load_state_dict(
            on_main(accelerator, lambda: {key: t.cpu() for key, t in adapter.state_dict().items()})
        )


@torch.no_grad()
def sum_gradients(
    loss: float, parameters: Sequence[nn.Parameter], accelerator: Accelerator
) -> float:
    """Add up every parameter's gradient over the processes, in one message; return the sum of their losses."""
    if accelerator.num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    head = torch.tensor(
        [loss, *(float(p.grad is not None) for p in parameters)], device=accelerator.device
    )
    summed = accelerator.reduce(
        torch.cat([head, *(gradient.flatten().float() for gradient in gradients)]), "sum"
    )
    head, *parts = summed.split([len(head), *(p.numel() for p in parameters)])
    for parameter, present, part in zip(parameters, head[1:].tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if present else None
    return float(head[0])
