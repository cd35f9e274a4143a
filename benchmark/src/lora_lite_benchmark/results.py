"""What a run leaves behind: a JSON file with the config, versions, outcomes and measurements."""

import math
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from lora_lite_benchmark.config import Record, RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_text

__all__ = [
    "AtScale",
    "Forgetting",
    "Measurements",
    "Outcome",
    "Point",
    "Result",
    "Split",
    "load_results",
    "machine",
    "versions",
]

FILE = "result.json"

COMPUTING = (
    "lora-lite-benchmark",
    "lora-lite-core",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
)
"""The packages that have a part in the figures of every run."""


class Outcome(Record):
    """What a model made of one problem.

    Attributes:
        reference: the final number of the reference answer.
        prediction: what the model wrote.
        number: the final number of that; None if it holds none.
        nats: the negative log likelihood of the reference answer.
        tokens: the length of the reference answer.
    """

    question: str
    reference: str
    prediction: str
    number: str | None
    correct: bool
    nats: float
    tokens: int


class Split(Record):
    """The outcomes on one set of problems, and their means."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        return sum(outcome.correct for outcome in self.outcomes) / len(self.outcomes)

    @property
    def accuracy_error(self) -> float:
        """The standard error of `accuracy`, from the binomial distribution."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.outcomes))

    @property
    def answered(self) -> float:
        """The share of predictions that hold a number."""
        return sum(outcome.number is not None for outcome in self.outcomes) / len(self.outcomes)

    @property
    def loss(self) -> float:
        """Nats per answer token. Every token counts the same."""
        tokens = sum(outcome.tokens for outcome in self.outcomes)
        return sum(outcome.nats for outcome in self.outcomes) / tokens


class AtScale(Record):
    """The losses, in nats a token, at a scale of the adapter: on held-out text and on the task."""

    scale: float
    held_out_loss: float
    task_loss: float


class Forgetting(Record):
    """The losses on held-out text of the base's own distribution.

    Attributes:
        before: the nats of each text under the base.
        after: those under the trained model.
        tokens: that are counted of each text.
        scales: the same at scales of the adapter, on the first hundred texts and problems.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    tokens: tuple[int, ...]
    scales: tuple[AtScale, ...] = ()


class Point(Record):
    """One step of the training curve.

    `loss` is in nats per answer token, `grad_norm` the norm of the gradient before clipping.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float


class Measurements(Record):
    """What the row costs. None means that a figure does not apply: the base has no backward and no
    file.

    Attributes:
        parameters: trainable scalars.
        macs_per_token: multiply-accumulates that the adapter adds for each token.
        macs_per_forward: those that it adds once for each forward.
        inference_ms: of a forward of one training batch with the adapter frozen, without gradients.
        forward_ms: of a forward of that batch in training.
        backward_ms: of the backward after it.
        inference_ratio: to the base's, measured in turns with it; the median over the turns, with
            its quartiles in `_low` and `_high`. None also in results of earlier versions.
        step_ratio: of forward and backward, likewise.
        calibration_s: the pass of calibration data through the model. None also for variants that
            need none.
        init_s: attaching, without that pass.
        train_s: in this process. A run that was resumed took longer as a whole.
        peak_memory_of: whether the peak is of the whole process or of the accelerator's tensors.
        slim_file_bytes: of the file without derived tensors. None also for variants that cannot
            leave them out.
    """

    parameters: int
    macs_per_token: int
    macs_per_forward: int
    inference_ms: float | None = None
    forward_ms: float
    backward_ms: float | None
    inference_ratio: float | None = None
    inference_ratio_low: float | None = None
    inference_ratio_high: float | None = None
    step_ratio: float | None = None
    step_ratio_low: float | None = None
    step_ratio_high: float | None = None
    calibration_s: float | None = None
    init_s: float | None
    train_s: float | None
    peak_memory_bytes: int
    peak_memory_of: Literal["process", "accelerator"]
    file_bytes: int | None
    slim_file_bytes: int | None


class Result(Record):
    """A complete run.

    Attributes:
        skipped_rows: training rows that were left out as longer than `max_tokens`.
        forgetting: None if no text was given.
        reloaded_identical: whether the saved adapter, on a fresh base, gives the trained model's
            logits bit for bit. None if nothing was trained.
    """

    hash: str
    config: RunConfig
    versions: dict[str, str]
    machine: dict[str, str | int]
    skipped_rows: int
    measurements: Measurements
    reloaded_identical: bool | None
    test: Split | None
    validation: Split | None
    forgetting: Forgetting | None = None
    curve: tuple[Point, ...]

    @property
    def judged(self) -> Split:
        """The outcomes on the test problems, or on the validation problems if it has no others."""
        split = self.test or self.validation
        assert split is not None  # RunConfig asks for one of them
        return split

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """The result in `folder`, or None if there is none.

        Raises BenchmarkError if the file is not a result of this version.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError, BenchmarkError) as error:
            raise BenchmarkError(
                f"{path} is not a result of this version: {str(error).splitlines()[0]}",
                fix="Delete its folder to run it again",
            ) from None


def load_results(out: Path) -> list[Result]:
    """Every complete run below `out`. Raises BenchmarkError if there is none."""
    folders = sorted(path.parent for path in out.glob(f"*/{FILE}"))
    if not folders:
        raise BenchmarkError(
            f"there is no finished run in {out}",
            expected=f"A run writes {out}/<variant>-<hash>/{FILE}",
            fix=f"Start one with `lora-lite-bench run --out {out}`",
        )
    return [result for folder in folders if (result := Result.load(folder))]


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """The versions of Python, of the packages that every run uses, and of `packages`."""
    found = {"python": platform.python_version()}
    for name in (*COMPUTING, *packages):
        found[name] = metadata.version(name)
    return found


def machine(device: torch.device) -> dict[str, str | int]:
    """The machine that the times were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "name": name,
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
    }
