"""What an adapter costs in time, as ratios to its base.

The adapted model and a base without an adapter take turns on one training batch, in one process, so
that a machine that is busy with other things slows both. A turn of each model is

    inference    a forward without gradients, with the adapter frozen as it is when it answers
    step         forward and backward; the base's backward goes through all its layers

A ratio is the median over the turns of adapted / base, each turn with its own base. Its spread is
the quartiles: half of the turns lie between them. A step can cost less than the base's where the
adapter is on the last layers alone, since its backward ends there.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.evaluate import nats
from lora_lite_benchmark.measure import stopwatch
from lora_lite_benchmark.processes import on_main

__all__ = ["Costs", "Spread", "against_base", "alone"]

Freeze = Callable[[], AbstractContextManager[object]]

WARMUP = 2
FEWEST, MOST = 5, 15
ENOUGH_S = 10.0
"""After FEWEST turns, no turn begins that late."""


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float


class Turn(NamedTuple):
    """Seconds: of a forward without gradients, of one that records a graph, of its backward."""

    inference: float
    forward: float
    backward: float

    @property
    def step(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Costs:
    """Median milliseconds for one training batch, and ratios to the base's. The base itself has
    only the first two.

    Attributes:
        inference_ms: of a forward with the loss, without gradients.
        forward_ms: of a forward with the loss, which records a graph if something trains.
        backward_ms: of the backward after it.
    """

    inference_ms: float
    forward_ms: float
    backward_ms: float | None = None
    inference_ratio: Spread | None = None
    step_ratio: Spread | None = None


def alone(model: nn.Module, batch: Batch, accelerator: Accelerator) -> Costs:
    """The costs of a base, which is not compared with anything."""
    forward_ms = _median_ms([_inference(model, batch) for _ in _numbers(accelerator)][WARMUP:])
    return Costs(forward_ms, forward_ms)


def against_base(
    model: nn.Module, frozen: Freeze, base: nn.Module, batch: Batch, accelerator: Accelerator
) -> Costs:
    """The costs of `model`, which has an adapter, and how they compare with those of `base`.

    Gradients are thrown away. `frozen` freezes the adapter for the time of a forward.
    """
    adapted: list[Turn] = []
    plain: list[Turn] = []
    base.requires_grad_(False)
    with _differentiable_embeddings(base):
        for number in _numbers(accelerator):
            # Whoever comes second finds warm caches.
            if number % 2:
                plain.append(_turn(base, nullcontext, batch))
                adapted.append(_turn(model, frozen, batch))
            else:
                adapted.append(_turn(model, frozen, batch))
                plain.append(_turn(base, nullcontext, batch))
    turns = list(zip(adapted, plain, strict=True))[WARMUP:]
    return Costs(
        inference_ms=_median_ms([ours.inference for ours, _ in turns]),
        forward_ms=_median_ms([ours.forward for ours, _ in turns]),
        backward_ms=_median_ms([ours.backward for ours, _ in turns]),
        inference_ratio=_spread([ours.inference / its.inference for ours, its in turns]),
        step_ratio=_spread([ours.step / its.step for ours, its in turns]),
    )


def _numbers(accelerator: Accelerator) -> Iterator[int]:
    """The numbers of the turns, those of the warm-up included. All processes take as many."""
    start = time.perf_counter()
    for number in range(WARMUP + MOST):
        if number >= WARMUP + FEWEST and on_main(
            accelerator, lambda: time.perf_counter() - start > ENOUGH_S
        ):
            return
        yield number


def _turn(model: nn.Module, freeze: Freeze, batch: Batch) -> Turn:
    with freeze():
        inference = _inference(model, batch)
    device = batch.input_ids.device
    forward, loss = stopwatch(lambda: nats(model, batch).sum(), device)
    backward, _nothing = stopwatch(loss.backward, device)
    model.zero_grad()
    return Turn(inference, forward, backward)


@torch.no_grad()
def _inference(model: nn.Module, batch: Batch) -> float:
    seconds, _loss = stopwatch(lambda: nats(model, batch).sum(), batch.input_ids.device)
    return seconds


@contextmanager
def _differentiable_embeddings(base: nn.Module) -> Iterator[None]:
    """Let the backward of a base in which nothing trains go through all of its layers."""

    def differentiable(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    embeddings: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(differentiable)
    try:
        yield
    finally:
        handle.remove()


def _median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _spread(values: list[float]) -> Spread:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)
