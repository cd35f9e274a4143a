"""The protocol of the experiment: one row of the table, from its config to its result.

    prepare      the base model, the training rows, and the batch that costs are measured on
    attach       put the adapter on the model, calibrated if the variant asks for it
    check        the adapter costs the MACs that it declares; with `perturb`, its wiring is right
    shard        leave each process its shard, if it was launched so
    train        the loop of `train.py`
    measure      the peak of memory; the time of a step and of a forward, in turns with the base
    evaluate     answers and losses on the validation and the test problems; what is forgotten
    save         the adapter as a file
    reload       the file on a fresh base
    verify       it gives the trained model's logits, bit for bit
    record       everything as one result

`series.py` runs many rows.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import lora_lite as ll
import torch
from torch import Tensor

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.costs import Costs, against_base, alone
from lora_lite_benchmark.data import collate
from lora_lite_benchmark.evaluate import evaluate
from lora_lite_benchmark.forgetting import before, forgetting
from lora_lite_benchmark.measure import TimedPass, peak_memory, reset_peak_memory, synchronize
from lora_lite_benchmark.processes import on_main, same_start, share
from lora_lite_benchmark.record import CHECKPOINT_FILE, Attached, Found, Trained, record
from lora_lite_benchmark.results import Result, Split
from lora_lite_benchmark.setup import Setup, fresh_base, prepare
from lora_lite_benchmark.sharded import shard
from lora_lite_benchmark.train import epoch_order, train
from lora_lite_benchmark.variants import AnyAdapter, attach_adapter
from lora_lite_benchmark.verify import Macs, check_macs

__all__ = ["attach", "run_one"]


def run_one(config: RunConfig, out: Path) -> Result:
    """Train, test and save one row, and prove the saved file.

    A run that is complete is read instead of repeated, and a run that was killed goes on from its
    checkpoint. Every process of a launch calls this and gets the result.
    """
    folder = out / config.folder
    accelerator = share(config)
    finished = on_main(accelerator, lambda: Result.load(folder))
    if finished is not None:
        return finished

    setup = prepare(config, folder, accelerator)
    attached = attach(setup)
    adapter = attached.adapter
    macs = _check(setup, adapter)
    shard(setup.model, accelerator)
    known = before(setup, adapter)
    found = Found(
        attached=attached,
        macs=macs,
        trained=_train(setup, adapter),
        peak=peak_memory(setup.device),
        costs=_measure(setup, adapter),
        validation=_evaluate(setup, adapter, "validation"),
        test=_evaluate(setup, adapter, "test"),
        forgetting=forgetting(setup, adapter, known),
    )
    return record(setup, found)


# --- attach and check


def attach(setup: Setup) -> Attached:
    """Put the adapter on the model. A variant that calibrates takes a pass over training rows."""
    calibration = TimedPass(_calibration_batches(setup), setup.device)
    started = time.perf_counter()
    adapter = attach_adapter(setup.model, setup.config, calibration)
    synchronize(setup.device)
    seconds = time.perf_counter() - started
    same_start(adapter, setup.accelerator)
    return Attached(adapter, calibration.seconds, seconds - (calibration.seconds or 0.0))


def _calibration_batches(setup: Setup) -> Iterator[dict[str, Tensor]]:
    """Batches of training rows, as keyword arguments of the model."""
    config = setup.config
    order = epoch_order(len(setup.examples), config.seed, epoch=0)
    rows = [setup.examples[row] for row in order[: config.calibration_rows]]
    for start in range(0, len(rows), config.batch_size):
        batch = collate(rows[start : start + config.batch_size], setup.pad)
        yield batch._asdict()


def _check(setup: Setup, adapter: AnyAdapter) -> Macs:
    """Check the declared MACs. With `perturb`, also check the wiring, and move the start values."""
    batch = setup.batch.to(next(setup.model.parameters()).device)
    macs = check_macs(setup.model, adapter, batch)
    if setup.config.perturb and setup.has_adapter:
        if setup.is_ours:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            ll.check(setup.model, inputs)
        _perturb(adapter, setup.config)
    return macs


@torch.no_grad()
def _perturb(adapter: AnyAdapter, config: RunConfig) -> None:
    """Add noise to every trainable tensor. It is the same for the same seed."""
    generator = torch.Generator().manual_seed(config.seed)
    for _, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(config.perturb * noise)


# --- train, measure and evaluate


def _train(setup: Setup, adapter: AnyAdapter) -> Trained:
    reset_peak_memory(setup.device)
    if not setup.trains:
        return Trained((), None)
    started = time.perf_counter()
    curve = train(
        setup.model,
        adapter,
        setup.examples,
        setup.config,
        setup.accelerator,
        setup.pad,
        setup.folder / CHECKPOINT_FILE,
    )
    return Trained(tuple(curve), time.perf_counter() - started)


def _measure(setup: Setup, adapter: AnyAdapter) -> Costs:
    """The time of a step and of a forward, in turns with a fresh base."""
    if not setup.trains:
        return alone(setup.model, setup.batch, setup.accelerator)
    base = fresh_base(setup.config, setup.accelerator)
    shard(base, setup.accelerator)
    return against_base(setup.model, adapter.frozen, base, setup.batch, setup.accelerator)


def _evaluate(setup: Setup, adapter: AnyAdapter, name: str) -> Split | None:
    """Answers and losses on one set of problems; None if the config has no such set."""
    problems = setup.problems.get(name)
    if problems is None:
        return None
    title = f"{setup.config.label}: {name}"
    with adapter.frozen():
        outcomes = evaluate(
            setup.model, setup.tokenizer, setup.config, problems, title, setup.accelerator
        )
    return Split(outcomes=tuple(outcomes))
