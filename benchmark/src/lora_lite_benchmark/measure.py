"""Time and memory. Times are medians after warm-up, with the accelerator's queue drained before the clock is read."""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.evaluate import nats

__all__ = ["TimedPass", "peak_memory", "reset_peak_memory", "stopwatch", "synchronize", "time_step"]

Item = TypeVar("Item")

MEMORY_STATUS = Path("/proc/self/status")
MEMORY_RESET = Path("/proc/self/clear_refs")


def time_step(
    model: nn.Module, batch: Batch, backward: bool, repeats: int = 7, warmup: int = 2
) -> tuple[float, float]:
    """Median milliseconds of the forward (with the loss) and of the backward of `batch`; gradients are thrown away.

    Without `backward` no graph is recorded and the second figure is 0.
    """
    device = batch.input_ids.device
    forwards, backwards = [], []
    with torch.set_grad_enabled(backward):
        for _ in range(warmup + repeats):
            seconds, loss = stopwatch(lambda: nats(model, batch).sum(), device)
            forwards.append(seconds)
            backwards.append(stopwatch(loss.backward, device)[0] if backward else 0.0)
            model.zero_grad()
    return 1000 * statistics.median(forwards[warmup:]), 1000 * statistics.median(backwards[warmup:])


class TimedPass(Generic[Item]):
    """An iterable that takes the time of the pass over it: from when the first item is asked for until there are no more.

    Given to `attach` as calibration data, it tells the pass through the model from what comes before and after.
    """

    def __init__(self, items: Iterable[Item], device: torch.device) -> None:
        self.items, self.device = items, device
        self.seconds: float | None = None  # None: not passed over

    def __iter__(self) -> Iterator[Item]:
        synchronize(self.device)
        start = time.perf_counter()
        yield from self.items
        synchronize(self.device)
        self.seconds = time.perf_counter() - start


def stopwatch(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds that `work` takes, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. Linux can do so for a process; elsewhere the process's peak is that of its whole life."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif MEMORY_RESET.exists():
        MEMORY_RESET.write_text("5")


def peak_memory(device: torch.device) -> tuple[int, Literal["process", "accelerator"]]:
    """The peak in bytes since the last reset, and whose it is: the "accelerator"'s tensors or the whole "process"."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "accelerator"
    if MEMORY_STATUS.exists():
        line = next(
            line for line in MEMORY_STATUS.read_text().splitlines() if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024, "process"
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024, "process"
