"""What a run came to: the adapter saved and proved, and everything that was found as one file.

The main process alone does this, unless the model is in shards: then all save and reload together,
and need a common file system.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lora_lite as ll

from lora_lite_benchmark.costs import Costs, Spread
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.processes import is_sharded, on_main, together
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
    """Save and prove the adapter, write the result, and remove what was needed until then.

    Every process calls this and gets the result.
    """
    adapter = found.attached.adapter
    slim: Path | None = None
    if setup.trains:
        together(setup.accelerator, lambda: adapter.save(setup.adapter_file))
        together(setup.accelerator, lambda: _reload_and_verify(setup))
    if setup.is_ours:
        slim = together(setup.accelerator, lambda: _slim_file(setup, adapter))
    return on_main(setup.accelerator, lambda: _write(setup, found, slim))


def _write(setup: Setup, found: Found, slim: Path | None) -> Result:
    config = setup.config
    result = Result(
        hash=config.hash,
        config=config,
        versions=versions(packages(config)),
        machine={
            **machine(setup.device),
            "processes": setup.accelerator.num_processes,
            "sharding": "FSDP2" if is_sharded(setup.accelerator) else "none",
        },
        skipped_rows=setup.skipped,
        measurements=_measurements(setup, found, slim),
        # Otherwise `_reload_and_verify` would have raised an error.
        reloaded_identical=True if setup.trains else None,
        test=found.test,
        validation=found.validation,
        forgetting=found.forgetting,
        curve=found.trained.curve,
    )
    result.save(setup.folder)
    # Files with a dot are the slim one, and those that were half-written when a run was killed.
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
    trained = logits(setup.model, sample)
    reload_agrees(setup.config, setup.adapter_file, sample, trained, setup.accelerator)


def _measurements(setup: Setup, found: Found, slim: Path | None) -> Measurements:
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
        slim_file_bytes=slim.stat().st_size if slim else None,
    )


def _spread(name: str, spread: Spread | None) -> dict[str, float]:
    if spread is None:
        return {}
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _slim_file(setup: Setup, adapter: AnyAdapter) -> Path | None:
    """A file without the derived tensors.

    None if calibration data shaped them: they could not be derived again without it.
    """
    path = setup.folder / f".slim-{setup.adapter_file.name}"
    try:
        adapter.save(path, derived=False)
    except ll.LoraLiteError:
        return None
    return path
