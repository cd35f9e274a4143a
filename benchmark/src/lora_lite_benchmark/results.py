"""What a run leaves behind: one JSON file with the config, the versions, every outcome and every measurement."""

import json
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


class Outcome(Record):
    """One problem's. `nats` is the reference answer's negative log likelihood, `tokens` its length."""

    question: str
    reference: str
    prediction: str
    number: str | None  # None: the prediction holds no number
    correct: bool
    nats: float
    tokens: int


class Split(Record):
    """The outcomes on one set of problems, and what they sum up to."""

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
        """Nats per answer token, every token counting the same."""
        return sum(outcome.nats for outcome in self.outcomes) / sum(
            outcome.tokens for outcome in self.outcomes
        )


class Point(Record):
    """One step of the training curve: the loss in nats per answer token, the gradient's norm before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float


class Measurements(Record):
    """Costs. None: does not apply to this row (the base has no backward, no file)."""

    parameters: int
    macs_per_token: int
    macs_per_forward: int
    forward_ms: float  # median, one batch
    backward_ms: float | None
    calibration_s: float | None = (
        None  # the pass of calibration data; None also where the variant needs none
    )
    init_s: float | None  # attach without that pass
    train_s: float | None  # in this process: less than the whole if the run was resumed
    peak_memory_bytes: int
    peak_memory_of: Literal["process", "accelerator"]
    file_bytes: int | None
    slim_file_bytes: int | None  # without derived tensors, where the variant has any


class Result(Record):
    """A complete run. `reloaded_identical`: the saved adapter, on a fresh base, gives the trained model's logits bit by
    bit; None where nothing was trained.
    """

    hash: str
    config: RunConfig
    versions: dict[str, str]
    machine: dict[str, str | int]
    skipped_rows: int  # training rows longer than max_tokens
    measurements: Measurements
    reloaded_identical: bool | None
    test: Split | None
    validation: Split | None
    curve: tuple[Point, ...]

    @property
    def judged(self) -> Split:
        """The outcomes on the test problems if it has them, else on the validation problems: a config has one of them."""
        split = self.test or self.validation
        assert split is not None
        return split

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """The result in `folder`; None if there is none. Raises BenchmarkError for a file that is not a result."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise BenchmarkError(
                f"{path}: not a result of this version; delete its folder to run it again ({_line(error)})"
            ) from None


def load_results(out: Path) -> list[Result]:
    """Every complete run below `out`. Raises BenchmarkError if there is none."""
    folders = sorted(path.parent for path in out.glob(f"*/{FILE}"))
    if not folders:
        raise BenchmarkError(
            f"{out}: no finished run here; expected {out}/<variant>-<hash>/{FILE}, from `lora-lite-bench run --out {out}`"
        )
    return [result for folder in folders if (result := Result.load(folder))]


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of what computes the numbers, and of `packages`."""
    names = [
        "lora-lite-benchmark",
        "lora-lite-core",
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        *packages,
    ]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def machine(device: torch.device) -> dict[str, str | int]:
    """What the times were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "name": name,
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
    }


def _line(error: Exception) -> str:
    return json.dumps(str(error).splitlines()[0])
