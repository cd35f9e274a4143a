"""Time and memory. The accelerator's queue is drained before the clock is read."""

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

__all__ = ["TimedPass", "peak_memory", "reset_peak_memory", "stopwatch", "synchronize"]

Item = TypeVar("Item")
Found = TypeVar("Found")

MEMORY_STATUS = Path("/proc/self/status")
MEMORY_RESET = Path("/proc/self/clear_refs")


class TimedPass(Generic[Item]):
    """An iterable that measures the pass over it: from the moment when the first item is asked for
    until there are no more.

    Given to `attach` as calibration data, it tells the pass through the model from what comes
    before and after. `seconds` is None until the pass is over.
    """

    def __init__(self, items: Iterable[Item], device: torch.device) -> None:
        self.items = items
        self.device = device
        self.seconds: float | None = None

    def __iter__(self) -> Iterator[Item]:
        synchronize(self.device)
        start = time.perf_counter()
        yield from self.items
        synchronize(self.device)
        self.seconds = time.perf_counter() - start


def stopwatch(work: Callable[[], Found], device: torch.device) -> tuple[float, Found]:
    """The seconds that `work` takes, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    found = work()
    synchronize(device)
    return time.perf_counter() - start, found


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done everything that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Start to look for a new peak.

    Linux can do so for a process. On other systems the peak of a process is that of its whole life.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif MEMORY_RESET.exists():
        MEMORY_RESET.write_text("5")


def peak_memory(device: torch.device) -> tuple[int, Literal["process", "accelerator"]]:
    """The peak in bytes since the last reset, and whether it is of the tensors on the accelerator
    or of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "accelerator"
    if MEMORY_STATUS.exists():
        lines = MEMORY_STATUS.read_text().splitlines()
        high_water_mark = next(line for line in lines if line.startswith("VmHWM:"))
        return int(high_water_mark.split()[1]) * 1024, "process"
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, other systems in kB.
    return usage if sys.platform == "darwin" else usage * 1024, "process"
