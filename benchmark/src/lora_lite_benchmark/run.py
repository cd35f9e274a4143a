"""The protocol of the experiment: one row of the table, from its config to its result.

    prepare      the base model, the training rows, and the batch that costs are measured on
    attach       put the adapter on the model, calibrated if the variant asks for it
    check        the adapter costs the MACs that it declares; with `perturb`, its wiring is right
    train        the loop of `train.py`
    measure      the time of a forward and of a backward, the peak of memory
    evaluate     answers and losses on the validation and the test problems
    save         the adapter as a file
    reload       the file on a fresh base
    verify       it gives the trained model's logits, bit for bit
    record       everything as one result

`series.py` runs many rows.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_lite_benchmark.config import SPECIAL_ROWS, RunConfig, Source
from lora_lite_benchmark.data import Batch, Example, collate, load_problems, training_examples
from lora_lite_benchmark.evaluate import evaluate
from lora_lite_benchmark.measure import (
    TimedPass,
    peak_memory,
    reset_peak_memory,
    synchronize,
    time_step,
)
from lora_lite_benchmark.models import load_model, load_tokenizer
from lora_lite_benchmark.processes import on_main, same_start, share
from lora_lite_benchmark.results import Measurements, Point, Result, Split, machine, versions
from lora_lite_benchmark.train import batch_rows, epoch_order, train
from lora_lite_benchmark.variants import AnyAdapter, attach_adapter, distribution
from lora_lite_benchmark.verify import check_macs, logits, reload_agrees

__all__ = ["ADAPTER_FILE", "ERROR_FILE", "run_one"]

ADAPTER_FILE = "adapter.safetensors"
CHECKPOINT_FILE = "checkpoint.pt"
ERROR_FILE = "error.txt"
VERIFIED_ROWS = 4
QUANTIZING = ("bitsandbytes", "lora-lite-bitsandbytes")


def run_one(config: RunConfig, out: Path) -> Result:
    """Train, test and save one row, and prove the saved file.

    A run that is complete is read instead of repeated, and a run that was killed goes on from its
    checkpoint. Every process of a launch calls this and gets the result.
    """
    folder = out / config.folder
    accelerator = share(config.batch_size)
    finished = on_main(accelerator, lambda: Result.load(folder))
    if finished is not None:
        return finished

    setup = _prepare(config, folder, accelerator)
    attached = _attach(setup)
    _check(setup, attached.adapter)
    trained = _train(setup, attached.adapter)
    costs = _measure(setup)
    validation = _evaluate(setup, attached.adapter, "validation", config.validation)
    test = _evaluate(setup, attached.adapter, "test", config.test)

    def save_reload_verify_record() -> Result:
        if setup.trains:
            _save(setup, attached.adapter)
            _reload_and_verify(setup)
        return _record(setup, attached, trained, costs, validation, test)

    return on_main(accelerator, save_reload_verify_record)


# --- prepare


@dataclass(frozen=True)
class Setup:
    """What every step works with.

    Attributes:
        folder: of this run's files.
        model: the base, on which the adapter comes.
        examples: the training rows as tokens.
        skipped: how many training rows were too long.
        batch: the rows of the first training step, on which costs are measured.
    """

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    tokenizer: Any
    model: nn.Module
    examples: list[Example]
    skipped: int
    batch: Batch

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def pad(self) -> int:
        token: int = self.tokenizer.pad_token_id
        return token

    @property
    def trains(self) -> bool:
        return self.config.variant != "base"

    @property
    def has_adapter(self) -> bool:
        return self.config.variant not in SPECIAL_ROWS

    @property
    def adapter_file(self) -> Path:
        return self.folder / ADAPTER_FILE


def _prepare(config: RunConfig, folder: Path, accelerator: Accelerator) -> Setup:
    tokenizer = load_tokenizer(config)
    examples, skipped = training_examples(tokenizer, config)
    first_rows = batch_rows(0, len(examples), config)
    batch = collate([examples[row] for row in first_rows], tokenizer.pad_token_id)
    return Setup(
        config=config,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=load_model(config, accelerator.device),
        examples=examples,
        skipped=skipped,
        batch=batch.to(accelerator.device),
    )


# --- attach and check


@dataclass(frozen=True)
class Attached:
    """The adapter and the seconds it took: of the calibration pass, if any, and of all the rest."""

    adapter: AnyAdapter
    calibration_s: float | None
    init_s: float


def _attach(setup: Setup) -> Attached:
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


def _check(setup: Setup, adapter: AnyAdapter) -> None:
    """Check the declared MACs. With `perturb`, also check the wiring, and move the start values."""
    check_macs(setup.model, adapter, setup.batch)
    if setup.config.perturb and setup.has_adapter:
        batch = setup.batch
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        ll.check(setup.model, inputs)
        _perturb(adapter, setup.config)


@torch.no_grad()
def _perturb(adapter: AnyAdapter, config: RunConfig) -> None:
    """Add noise to every trainable tensor. It is the same for the same seed."""
    generator = torch.Generator().manual_seed(config.seed)
    for _, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(config.perturb * noise)


# --- train, measure and evaluate


@dataclass(frozen=True)
class Trained:
    """The training curve, and the seconds of this process. The base has neither."""

    curve: tuple[Point, ...]
    seconds: float | None


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


@dataclass(frozen=True)
class Costs:
    """Median milliseconds for one training batch, and the peak of memory since training began."""

    forward_ms: float
    backward_ms: float | None
    peak_bytes: int
    peak_of: Literal["process", "accelerator"]


def _measure(setup: Setup) -> Costs:
    forward_ms, backward_ms = time_step(setup.model, setup.batch, backward=setup.trains)
    peak_bytes, peak_of = peak_memory(setup.device)
    return Costs(forward_ms, backward_ms if setup.trains else None, peak_bytes, peak_of)


def _evaluate(setup: Setup, adapter: AnyAdapter, name: str, source: Source | None) -> Split | None:
    """Answers and losses on one set of problems; None if the config has no such set."""
    if source is None:
        return None
    title = f"{setup.config.label}: {name}"
    problems = load_problems(source)
    with adapter.frozen():
        outcomes = evaluate(
            setup.model, setup.tokenizer, setup.config, problems, title, setup.accelerator
        )
    return Split(outcomes=tuple(outcomes))


# --- save, reload, verify and record: the main process alone


def _save(setup: Setup, adapter: AnyAdapter) -> None:
    adapter.save(setup.adapter_file)


def _reload_and_verify(setup: Setup) -> None:
    """Load the file on a fresh base, and compare its logits with the trained model's."""
    sample = Batch(*(tensor[:VERIFIED_ROWS] for tensor in setup.batch))
    reload_agrees(setup.config, setup.adapter_file, sample, logits(setup.model, sample))


def _record(
    setup: Setup,
    attached: Attached,
    trained: Trained,
    costs: Costs,
    validation: Split | None,
    test: Split | None,
) -> Result:
    """Write the result, and remove what is only needed until there is one."""
    config = setup.config
    result = Result(
        hash=config.hash,
        config=config,
        versions=versions(_packages(config)),
        machine={**machine(setup.device), "processes": setup.accelerator.num_processes},
        skipped_rows=setup.skipped,
        measurements=_measurements(setup, attached, trained, costs),
        # Otherwise `_reload_and_verify` would have raised an error.
        reloaded_identical=True if setup.trains else None,
        test=test,
        validation=validation,
        curve=trained.curve,
    )
    result.save(setup.folder)
    # Files with a dot were half-written when a run was killed.
    for path in (
        setup.folder / CHECKPOINT_FILE,
        setup.folder / ERROR_FILE,
        *setup.folder.glob(".*"),
    ):
        path.unlink(missing_ok=True)
    return result


def _packages(config: RunConfig) -> list[str]:
    """The packages of this row alone: the variant's, and those that quantise."""
    packages = distribution(config.variant)
    if config.quantization != "none":
        packages += QUANTIZING
    return packages


def _measurements(setup: Setup, attached: Attached, trained: Trained, costs: Costs) -> Measurements:
    adapter = attached.adapter
    return Measurements(
        parameters=adapter.num_parameters,
        macs_per_token=adapter.macs_per_token,
        macs_per_forward=adapter.macs_per_forward,
        forward_ms=costs.forward_ms,
        backward_ms=costs.backward_ms,
        calibration_s=attached.calibration_s,
        init_s=attached.init_s if setup.trains else None,
        train_s=trained.seconds,
        peak_memory_bytes=costs.peak_bytes,
        peak_memory_of=costs.peak_of,
        file_bytes=setup.adapter_file.stat().st_size if setup.trains else None,
        slim_file_bytes=_slim_size(setup, adapter) if setup.has_adapter else None,
    )


def _slim_size(setup: Setup, adapter: AnyAdapter) -> int | None:
    """The bytes of the file without derived tensors.

    None if calibration data shaped them: they could not be derived again without it.
    """
    path = setup.folder / f".slim-{ADAPTER_FILE}"
    try:
        adapter.save(path, derived=False)
        return path.stat().st_size
    except ll.LoraLiteError:
        return None
    finally:
        path.unlink(missing_ok=True)
