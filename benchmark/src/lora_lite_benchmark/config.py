"""What a run is: one validated record, everything that its outcome depends on.

The hash of the record names the run's folder, so equal configs are the same run. `preset.py` makes
these records from presets and the command line.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.errors import BenchmarkError

__all__ = ["SOURCES", "SPECIAL_ROWS", "SPLITS", "FieldValue", "Record", "RunConfig", "Source"]

SPECIAL_ROWS = ("base", "full")
"""Rows without an adapter: the base as it is, and the base with every weight trained."""

SPLITS = ("train", "validation", "test")
SOURCES = (*SPLITS, "forgetting")

NOT_IDENTITY = {"preset", "label", "checkpoint_every", "trials"}
"""Settings that do not change the result. They are left out of the hash."""

ADDED_LATER = {"implementation", "forgetting", "scales"}
"""Settings that the first version did not have. Left as they are, they do not change the hash, so
that the runs of that version are still those of their configs.
"""

TRAINING = {
    "train",
    "seed",
    "steps",
    "batch_size",
    "micro_batch_size",
    "lr",
    "warmup",
    "weight_decay",
    "clip_norm",
    "max_tokens",
    "calibration_rows",
    "perturb",
    "implementation",
    "forgetting",
    "scales",
    "fields",
    "targets",
    "exclude",
    "layers",
    "label",
}
"""Settings that only matter to a model that is trained. The base row's hash leaves them out, so
that the base is tested once, whatever the other rows are trained with."""

FieldValue = bool | int | float | str | None
NonNegative = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Immutable and strict: unknown names are refused, and "8" is not taken for 8."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants"
    )


class Source(Record):
    """Where questions and answers come from.

    Attributes:
        path: a local JSON-lines file, the id of a dataset on the hub, or the name of an embedded
            task, such as "tiny".
        name: the dataset's configuration on the hub, such as "main" for GSM8K.
        split: which part of a dataset.
        start: the first row.
        count: how many rows; None takes all.
        sha256: identifies a local file or the embedded problems. `resolve` fills it in.
    """

    path: str
    name: str | None = None
    # "home" is of embedded tasks alone: what their base was pretrained on.
    split: Literal["train", "validation", "test", "home"] = "train"
    start: Annotated[int, Field(ge=0)] = 0
    count: PositiveInt | None = None
    sha256: str | None = None

    @property
    def stop(self) -> int | None:
        """The first row that is left out; None takes all."""
        return None if self.count is None else self.start + self.count

    @classmethod
    def parse(cls, text: str, split: str) -> dict[str, Any]:
        """The fields that `FILE`, `tiny`, `skill` or `HUB_ID[:NAME[:SPLIT]]` stands for."""
        if text in TASKS:
            return {"path": text, "split": split}
        if Path(text).expanduser().exists() or text.endswith((".json", ".jsonl")):
            return {"path": text}
        hub_id, _, rest = text.partition(":")
        name, _, named_split = rest.partition(":")
        return {"path": hub_id, "name": name or None, "split": named_split or split}


class RunConfig(Record):
    """Everything that a run's outcome depends on, apart from software versions and the machine,
    which the result records.
    """

    preset: str
    # The row's name in the table, as it was asked for: "lora:r=4".
    label: str

    # An embedded task ("tiny", "skill"), a local directory, or a hub id.
    model: str
    # Of a hub id; None is the newest.
    revision: str | None = None
    # Of the files of a local directory; `resolve` fills it in.
    model_sha256: str | None = None
    # Of the base. Adapters stay in float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Of the base's linear layers, by bitsandbytes.
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"

    train: Source
    validation: Source | None = None
    test: Source | None = None
    # Held-out text of the base's own distribution: its loss before and after training.
    forgetting: Source | None = None
    # At these scales of the adapter, forgetting and the loss on the task are measured too.
    scales: tuple[Annotated[float, Field(ge=0)], ...] = ()
    # The answer follows as " {answer}" and the end-of-text token.
    prompt: str = "Question: {question}\nAnswer:"

    variant: str
    # Who computes it: this library, or PEFT from the same start.
    implementation: Literal["lora-lite", "peft"] = "lora-lite"
    fields: dict[str, FieldValue] = {}
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    # Rows of training data for variants that calibrate.
    calibration_rows: Annotated[int, Field(ge=0)] = 64
    # Noise added to the start values. Most variants start at delta = 0, where a mistake in the
    # wiring would not show. If this is above 0, the wiring is checked too.
    perturb: NonNegative = 0.0

    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    # Rows of one optimizer step.
    batch_size: PositiveInt = 8
    # Rows of one forward; None is batch_size.
    micro_batch_size: PositiveInt | None = None
    lr: NonNegative
    # The share of the steps in which the learning rate rises.
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: NonNegative = 0.0
    clip_norm: PositiveFloat = 1.0
    # Longer training rows are left out, and counted.
    max_tokens: PositiveInt = 1024

    # Of a generated answer; with 0 none is generated, and the loss alone is judged.
    max_new_tokens: Annotated[int, Field(ge=0)] = 300
    eval_batch_size: PositiveInt = 64
    # How many trials chose the settings; None if no sweep of ours did.
    trials: PositiveInt | None = None
    # In steps.
    checkpoint_every: PositiveInt = 200

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if "{question}" not in self.prompt:
            raise BenchmarkError(
                f"prompt is {self.prompt!r}",
                expected="It must contain {question}, the place of the question",
            )
        if self.test is None and self.validation is None:
            raise BenchmarkError(
                "test and validation are both missing",
                expected="A run needs test problems or validation problems",
            )
        if self.variant in SPECIAL_ROWS and self.implementation == "peft":
            raise BenchmarkError(
                f"the row 'peft:{self.variant}' was asked for",
                expected=f"{self.variant!r} has no adapter that PEFT could compute",
                fix=f"Ask for {self.variant!r}",
            )
        if self.variant == "full" and self.quantization != "none":
            raise BenchmarkError(
                f"quantization is {self.quantization!r} in the row 'full'",
                expected="Full fine-tuning trains every weight, and packed weights cannot be "
                "trained",
                fix="Leave out the row 'full'",
            )
        return self

    @property
    def generates(self) -> bool:
        """Whether the model answers, so that there is an accuracy."""
        return self.max_new_tokens > 0

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the outcome depends on, as JSON values.

        What is in a file counts, not where it is: a file with a digest has no path here.
        """
        left_out = NOT_IDENTITY | (TRAINING if self.variant == "base" else set())
        values = self.model_dump(mode="json", exclude=left_out)
        for setting in ADDED_LATER & values.keys():
            if getattr(self, setting) == RunConfig.model_fields[setting].default:
                del values[setting]
        if values["model_sha256"]:
            del values["model"]
        for name in SOURCES:
            source = values.get(name)
            if source and source["sha256"]:
                del source["path"]
        return values

    @property
    def hash(self) -> str:
        """Twelve hex digits that identify the run: equal for configs with equal outcomes."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def row_hash(self) -> str:
        """Like `hash`, and equal for the runs of one row, whose seeds differ."""
        return self.model_copy(update={"seed": 0}).hash

    @property
    def folder(self) -> str:
        prefix = "peft-" if self.implementation == "peft" else ""
        return f"{prefix}{self.variant}-{self.hash}"
