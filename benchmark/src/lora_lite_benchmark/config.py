"""What a run is: one validated record. Its hash names the run's folder, so equal configs are the same run.

A preset is a JSON file that gives most of the record and, per variant, the fields and the learning rate. `resolve` merges,
from weakest to strongest: the preset's `run`, the arm in the row's name (`lora@nf4`), the preset's entry for the variant, the
fields in the row's name (`lora:r=4`), the command line.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import sha256
from lora_lite_benchmark.tiny import MODEL_DIR
from lora_lite_benchmark.variants import recommended_lr, resolved_fields

__all__ = [
    "ALL",
    "SPECIAL_ROWS",
    "Preset",
    "PresetRow",
    "RunConfig",
    "Source",
    "parse_row",
    "preset_names",
    "resolve",
]

SPECIAL_ROWS = ("base", "full")
"""Rows without an adapter: the base model as it is, and the base model with every weight trained."""

ALL = "all"
"""Stands for the rows of all installed variants."""

TINY = "tiny"
"""The name of the embedded model and of the embedded data."""

NOT_IDENTITY = {"preset", "label", "checkpoint_every"}
"""Settings that change no result, left out of the hash."""

TRAINING = {
    "train", "seed", "steps", "batch_size", "micro_batch_size", "lr", "warmup", "weight_decay", "clip_norm",
    "max_tokens", "calibration_rows", "perturb", "fields", "targets", "exclude", "layers", "label",
}  # fmt: skip
"""Settings without effect on a model that is not trained: the base row is the same run whatever they are."""

PROBLEMS = MODEL_DIR.parent / "problems.py"
"""The generator of the embedded data: what its problems depend on."""

MODEL_FILES = {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja"}
"""What a directory of `save_pretrained` holds: config, weights, tokenizer."""

FieldValue = bool | int | float | str | None
NonNegative = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Immutable, and strict: no unknown names, no "8" for 8."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants"
    )


class Source(Record):
    """Where questions and answers come from: a local JSON-lines file, a dataset of the hub, or "tiny"."""

    path: str
    name: str | None = None  # the dataset's configuration on the hub: GSM8K's "main"
    split: Literal["train", "validation", "test"] = "train"
    start: Annotated[int, Field(ge=0)] = 0
    count: PositiveInt | None = None  # None: all rows
    sha256: str | None = None  # of a local file or the generator, filled in by resolve

    @classmethod
    def parse(cls, text: str, split: str) -> dict[str, Any]:
        """The fields that `FILE`, `tiny` or `HUB_ID[:NAME[:SPLIT]]` stands for."""
        if text == TINY:
            return {"path": text, "split": split}
        if Path(text).expanduser().exists() or text.endswith((".json", ".jsonl")):
            return {"path": text}
        path, name, found = [*text.split(":"), "", ""][:3]
        return {"path": path, "name": name or None, "split": found or split}


class RunConfig(Record):
    """Everything a run's outcome depends on, versions of software and the machine excepted (the result holds those)."""

    preset: str
    label: str  # the row's name in the table, as asked for: "lora:r=4"
    model: str  # "tiny", a local directory, or a hub id
    revision: str | None = None  # of a hub id; None: the newest
    model_sha256: str | None = None  # of a local directory's files, filled in by resolve
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base; adapters keep float32
    quantization: Literal["none", "nf4", "fp4", "int8"] = (
        "none"  # of the base's linear layers, by bitsandbytes
    )

    train: Source
    validation: Source | None = None
    test: Source | None = None
    prompt: str = "Question: {question}\nAnswer:"  # the answer follows as " {answer}" and the end-of-text token

    variant: str
    fields: dict[str, FieldValue] = {}
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    calibration_rows: Annotated[int, Field(ge=0)] = (
        64  # rows of training data, for variants that calibrate
    )
    perturb: NonNegative = 0.0  # noise on the start values: a start at delta = 0 hides mistakes; > 0 also checks the wiring

    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    batch_size: PositiveInt = 8  # rows of one optimizer step
    micro_batch_size: PositiveInt | None = None  # rows of one forward; None: batch_size
    lr: NonNegative
    warmup: Annotated[float, Field(ge=0, lt=1)] = (
        0.03  # share of the steps with a rising learning rate
    )
    weight_decay: NonNegative = 0.0
    clip_norm: PositiveFloat = 1.0
    max_tokens: PositiveInt = 1024  # longer training rows are left out, and counted

    max_new_tokens: PositiveInt = 300
    eval_batch_size: PositiveInt = 64
    checkpoint_every: PositiveInt = 200  # steps

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}: it must contain {{question}}")
        if self.test is None and self.validation is None:
            raise ValueError("test and validation are both missing: a run needs one of them")
        if self.variant == "full" and self.quantization != "none":
            raise ValueError(
                f"quantization is {self.quantization!r}: packed weights cannot be trained; leave out the row 'full'"
            )
        return self

    @property
    def hash(self) -> str:
        """Twelve hex digits that identify the run. Equal for configs that can only give the same outcome."""
        values = self.model_dump(
            mode="json", exclude=NOT_IDENTITY | (TRAINING if self.variant == "base" else set())
        )
        if values["model_sha256"]:
            del values["model"]  # what is in a file counts, not where it is
        for source in (values.get(split) for split in ("train", "validation", "test")):
            if source and source["sha256"]:
                del source["path"]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        return f"{self.variant}-{self.hash}"


class PresetRow(Record):
    """What a preset says about one row. What it leaves out is the variant's own default."""

    fields: dict[str, FieldValue] = {}
    lr: PositiveFloat | None = None  # None: the variant's recommended_lr
    targets: tuple[str, ...] | None = None  # None: those of the preset's run


class Preset(Record):
    """A named setting: defaults of the run, and rows for variants ("lora") or variants with fields ("lora:r=4").

    `rows` is what is run where the command line names no row. Each runs in every one of `arms`: a name ("" is plain) with
    further settings of the run. `extends` names a preset whose `run` and `variants` hold where this one is silent.
    """

    name: str
    description: str
    extends: str | None = None
    run: dict[str, Any] = {}
    rows: tuple[str, ...] = (ALL,)
    arms: dict[str, dict[str, Any]] = {"": {}}
    variants: dict[str, PresetRow] = {}

    @classmethod
    def load(cls, name: str) -> "Preset":
        if name not in preset_names():
            raise BenchmarkError(
                f"preset {name!r} does not exist; there are: {', '.join(preset_names())}"
            )
        path = files("lora_lite_benchmark") / "presets" / f"{name}.json"
        own = cls.model_validate_json(path.read_text(encoding="utf-8"))
        if own.extends is None:
            return own
        parent = cls.load(own.extends)
        return own.model_copy(
            update={
                "run": {**parent.run, **own.run},
                "variants": {**parent.variants, **own.variants},
            }
        )

    def arm(self, name: str) -> dict[str, Any]:
        """The settings of an arm. Raises BenchmarkError listing those that there are."""
        if name not in self.arms:
            known = ", ".join(repr(arm) for arm in self.arms if arm) or "none"
            raise BenchmarkError(f"preset {self.name!r} has no arm {name!r}; it has: {known}")
        return self.arms[name]


def preset_names() -> list[str]:
    folder = files("lora_lite_benchmark") / "presets"
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


def parse_row(text: str) -> tuple[str, dict[str, FieldValue]]:
    """`lora:r=4,alpha=8` is the variant `lora` with those fields; values are JSON, else plain strings."""
    variant, _, rest = text.partition(":")
    return variant, dict(
        parse_assignment(item, f"row {text!r}") for item in rest.split(",") if item
    )


def parse_assignment(text: str, where: str) -> tuple[str, FieldValue]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BenchmarkError(f"{where}: {text!r} is not of the form field=value")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    return name, parsed if not isinstance(parsed, (list, dict)) else value


def resolve(
    preset: Preset, row: str, fields: Mapping[str, FieldValue] | None = None, **overrides: Any
) -> RunConfig:
    """The whole config of one row: every default spelt out, local files identified by their contents.

    `fields` are the variant's, `overrides` RunConfig's own. Raises BenchmarkError naming the setting that is wrong, and
    lora_lite's errors for an unknown variant or field.
    """
    row, _, arm = row.partition("@")
    variant, own = parse_row(row)
    if variant in preset.variants and row not in preset.variants:
        entry = preset.variants[variant]
    else:
        entry = preset.variants.get(row, PresetRow())
    asked = {**entry.fields, **own, **(fields or {})}
    if variant in SPECIAL_ROWS and asked:
        raise BenchmarkError(
            f"row {row!r}: {variant!r} is no variant and has no fields; given {', '.join(asked)}"
        )
    values = {
        **preset.run,
        **preset.arm(arm),
        **entry.model_dump(exclude_none=True, exclude={"fields"}),
        **overrides,
        "preset": preset.name,
        "label": row_label(row, fields) + (f"@{arm}" if arm else ""),
        "variant": variant,
        "fields": {} if variant in SPECIAL_ROWS else resolved_fields(variant, asked),
    }
    if "lr" not in values:
        values["lr"] = _default_lr(variant)
    values = _identify_files(values)
    try:
        return RunConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise BenchmarkError(
            f"row {row!r} of preset {preset.name!r}: {first_problem(error)}"
        ) from None


def row_label(row: str, fields: Mapping[str, FieldValue] | None) -> str:
    """The row's name with the fields that the command line adds: "lora" and r=4 is "lora:r=4"."""
    variant, own = parse_row(row)
    shown = ",".join(f"{name}={value}" for name, value in {**own, **(fields or {})}.items())
    return f"{variant}:{shown}" if shown else variant


def _default_lr(variant: str) -> float:
    if variant == "base":
        return 0.0
    if variant == "full":
        raise BenchmarkError(
            "row 'full': neither the preset nor the command line gives a learning rate; use --lr"
        )
    return recommended_lr(variant)


def _identify_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with the digests of local files and of what is embedded, and paths made absolute."""
    result = dict(values)
    for split in ("train", "validation", "test"):
        source = result.get(split)
        if source and source.get("path") == TINY:
            result[split] = {**source, "sha256": sha256(PROBLEMS)}
        elif source and (path := Path(source.get("path", "")).expanduser()).is_file():
            result[split] = {**source, "path": str(path.resolve()), "sha256": sha256(path)}
    model = str(result.get("model"))
    folder = MODEL_DIR if model == TINY else Path(model).expanduser()
    if folder.is_dir():
        result["model"] = TINY if model == TINY else str(folder.resolve())
        result["model_sha256"] = model_digest(folder)
    return result


def model_digest(folder: Path) -> str:
    """The digest of a model directory's files."""
    return sha256(*sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES))


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic objects to, in one line: the setting, what is wrong, what was given."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    given = "" if problem["type"] == "missing" or not where else f", given {problem['input']!r}"
    return f"{where}: {problem['msg']}{given}" if where else problem["msg"]
