"""What a run came to: the adapter saved and proved, and everything that was found as one file.

Only the main process does this.
"""

from dataclasses import dataclass
from typing import Literal

import lora_lite as ll

from lora_lite_benchmark.costs import Costs, Spread
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.results import (
    Forgetting,
    Measurements,
    Point,
    Result,
    Split,
    machine,
    versions,
)
from lora_lite_benchmark.setup import Setup
from lora_lite_benchmark.variants import AnyAdapter, packages
from lora_lite_benchmark.verify import Macs, logits, reload_agrees

__all__ = ["CHECKPOINT_FILE", "ERROR_FILE", "Attached", "Found", "Trained", "record"]

CHECKPOINT_FILE = "checkpoint.pt"
ERROR_FILE = "error.txt"
VERIFIED_ROWS = 4


@dataclass(frozen=True)
class Attached:
    """The adapter and the seconds it took: of the calibration pass, if any, and of all the rest."""

    adapter: AnyAdapter
    calibration_s: float | None
    init_s: float


@dataclass(frozen=True)
class Trained:
    """The training curve, and the seconds of this process. The base has neither."""

    curve: tuple[Point, ...]
    seconds: float | None


@dataclass(frozen=True)
class Found:
    """What the steps of a run found.

    Attributes:
        macs: those that the adapter adds, as counted.
        peak: the peak of memory in bytes since training began, and what it is of.
        validation: None if the config has no such problems; so are `test` and `forgetting`.
    """

    attached: Attached
    macs: Macs
    trained: Trained
    peak: tuple[int, Literal["process", "accelerator"]]
    costs: Costs
    validation: Split | None
    test: Split | None
    forgetting: Forgetting | None


def record(setup: Setup, found: Found) -> Result:
    """Save and prove the adapter, write the result, and remove what was needed until then."""
    config = setup.config
    if setup.trains:
        found.attached.adapter.save(setup.adapter_file)
        _reload_and_verify(setup)
    result = Result(
        hash=config.hash,
        config=config,
        versions=versions(packages(config)),
        machine={**machine(setup.device), "processes": setup.accelerator.num_processes},
        skipped_rows=setup.skipped,
        measurements=_measurements(setup, found),
        # Otherwise `_reload_and_verify` would have raised an error.
        reloaded_identical=True if setup.trains else None,
        test=found.test,
        validation=found.validation,
        forgetting=found.forgetting,
        curve=found.trained.curve,
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


def _reload_and_verify(setup: Setup) -> None:
    """Load the file on a fresh base, and compare its logits with the trained model's."""
    sample = Batch(*(tensor[:VERIFIED_ROWS] for tensor in setup.batch))
    reload_agrees(setup.config, setup.adapter_file, sample, logits(setup.model, sample))


def _measurements(setup: Setup, found: Found) -> Measurements:
    adapter, costs = found.attached.adapter, found.costs
    peak_bytes, peak_of = found.peak
    return Measurements(
        parameters=adapter.num_parameters,
        macs_per_token=found.macs.per_token,
        macs_per_forward=found.macs.per_forward,
        inference_ms=costs.inference_ms,
        forward_ms=costs.forward_ms,
        backward_ms=costs.backward_ms,
        **_spread("inference_ratio", costs.inference_ratio),
        **_spread("step_ratio", costs.step_ratio),
        calibration_s=found.attached.calibration_s,
        init_s=found.attached.init_s if setup.trains else None,
        train_s=found.trained.seconds,
        peak_memory_bytes=peak_bytes,
        peak_memory_of=peak_of,
        file_bytes=setup.adapter_file.stat().st_size if setup.trains else None,
        slim_file_bytes=_slim_size(setup, adapter) if setup.is_ours else None,
    )


def _spread(name: str, spread: Spread | None) -> dict[str, float]:
    if spread is None:
        return {}
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _slim_size(setup: Setup, adapter: AnyAdapter) -> int | None:
    """The bytes of the file without derived tensors.

    None if calibration data shaped them: they could not be derived again without it.
    """
    path = setup.folder / f".slim-{setup.adapter_file.name}"
    try:
        adapter.save(path, derived=False)
        return path.stat().st_size
    except ll.LoraLiteError:
        return None
    finally:
        path.unlink(missing_ok=True)
