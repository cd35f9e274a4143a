"""What runs will cost on this machine, measured before they are started.

    lora-lite-bench run --preset llama-3.2-3b --variants lora dora --estimate

Every row is attached as it would be, takes a few steps of its training, and answers one batch of
its problems. Nothing is kept. The hours are

    training    steps x the seconds of a step
    testing     problems / rows of a batch x the seconds of such a batch, of all sets of problems

and the memory is the peak of these steps.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Problem
from lora_lite_benchmark.evaluate import evaluate
from lora_lite_benchmark.measure import peak_memory, reset_peak_memory, stopwatch
from lora_lite_benchmark.processes import share
from lora_lite_benchmark.run import attach
from lora_lite_benchmark.setup import Setup, prepare
from lora_lite_benchmark.sharded import shard
from lora_lite_benchmark.train import train
from lora_lite_benchmark.variants import AnyAdapter

__all__ = ["Estimate", "estimate", "estimate_table"]

FEW, MORE = 1, 4
"""Steps. The difference of their times is that of the steps between them, without what comes once:
warming up, the checkpoint."""


@dataclass(frozen=True)
class Estimate:
    """What one row costs.

    Attributes:
        seeds: how many runs it has.
        step_s: seconds of a training step; 0 for the base.
        training_s: of one run.
        testing_s: of one run.
        peak_bytes: of memory in training.
    """

    label: str
    seeds: int
    step_s: float
    training_s: float
    testing_s: float
    peak_bytes: int

    @property
    def total_s(self) -> float:
        """Of all its runs."""
        return self.seeds * (self.training_s + self.testing_s)


def estimate(configs: Sequence[RunConfig]) -> Estimate:
    """Measure one row, whose configs differ in their seeds alone."""
    config = configs[0]
    accelerator = share(config)
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(config, Path(folder), accelerator)
        adapter = attach(setup).adapter
        shard(setup.model, accelerator)
        reset_peak_memory(setup.device)
        step_s = _step_seconds(setup, adapter) if setup.trains else 0.0
        peak_bytes, _of = peak_memory(setup.device)
        with adapter.frozen():
            testing_s = sum(_testing_seconds(setup, each) for each in setup.problems.values())
    return Estimate(
        label=config.label,
        seeds=len(configs),
        step_s=step_s,
        training_s=step_s * config.steps if setup.trains else 0.0,
        testing_s=testing_s,
        peak_bytes=peak_bytes,
    )


def _step_seconds(setup: Setup, adapter: AnyAdapter) -> float:
    def seconds(steps: int) -> float:
        shorter = setup.config.model_copy(update={"steps": steps})
        checkpoint = setup.folder / f"{steps}.pt"
        taken, _curve = stopwatch(
            lambda: train(
                setup.model, adapter, setup.examples, shorter, setup.accelerator, setup.pad,
                checkpoint,
            ),
            setup.device,
        )  # fmt: skip
        return taken

    few = seconds(FEW)
    return max(seconds(MORE) - few, 0.0) / (MORE - FEW)


def _testing_seconds(setup: Setup, problems: Sequence[Problem]) -> float:
    """From one batch of problems of all lengths."""
    size = setup.config.eval_batch_size
    spread = problems[:: max(1, len(problems) // size)][:size]
    taken, _outcomes = stopwatch(
        lambda: evaluate(
            setup.model, setup.tokenizer, setup.config, spread, "estimate", setup.accelerator
        ),
        setup.device,
    )
    return taken * len(problems) / len(spread)


def estimate_table(estimates: Sequence[Estimate]) -> str:
    """The estimates as a table, and their sum."""
    lines = [
        "| row | runs | step s | training | testing | all runs | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in estimates:
        cells: list[Any] = [
            each.label,
            each.seeds,
            f"{each.step_s:.3g}" if each.step_s else "–",
            _duration(each.training_s),
            _duration(each.testing_s),
            _duration(each.total_s),
            f"{each.peak_bytes / 1e6:,.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = _duration(sum(each.total_s for each in estimates))
    runs = sum(each.seeds for each in estimates)
    return "\n".join([*lines, "", f"{runs} runs take about {total} on this machine."])


def _duration(seconds: float) -> str:
    """Hours and minutes, or seconds if they are few."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
