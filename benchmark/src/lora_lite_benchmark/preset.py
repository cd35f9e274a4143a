"""From a preset and a row's name to the config of a run.

A preset is a JSON file that gives most of the config and, for each row, the variant's fields and
the learning rate. `resolve` merges these settings, from weakest to strongest:

1. the preset's `run`,
2. the arm in the row's name (`lora@nf4`),
3. the preset's entry for the row,
4. the fields in the row's name (`lora:r=4`),
5. the command line.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_lite.errors import did_you_mean
from pydantic import PositiveFloat, ValidationError

from lora_lite_benchmark.config import SOURCES, SPECIAL_ROWS, FieldValue, Record, RunConfig
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import model_digest, sha256
from lora_lite_benchmark.peft_adapter import check_peft
from lora_lite_benchmark.variants import recommended_lr, resolved_fields

__all__ = ["ALL", "Preset", "PresetRow", "parse_assignment", "parse_row", "preset_names", "resolve"]

ALL = "all"
"""Stands for the rows of all installed variants."""

PEFT_PREFIX = "peft:"
"""Before a row's name: the same variant and fields, as PEFT computes them."""


class PresetRow(Record):
    """What a preset says about one row.

    Attributes:
        fields: of the variant. What is left out keeps the variant's default.
        lr: the learning rate; None takes the variant's `recommended_lr`.
        targets: the layers to adapt; None takes those of the preset's `run`.
    """

    fields: dict[str, FieldValue] = {}
    lr: PositiveFloat | None = None
    targets: tuple[str, ...] | None = None


class Preset(Record):
    """A named setting of the benchmark.

    Attributes:
        name: the file's name without its suffix.
        description: one line for `lora-lite-bench presets`.
        extends: another preset, whose `run` and `variants` hold where this one is silent.
        run: settings of RunConfig that all rows share.
        rows: what is run if the command line names no row.
        arms: further settings of the run by name. Every row is run in every arm; "" is the plain
            one.
        variants: settings of a variant ("lora") or of a variant with fields ("lora:r=4").
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
        """Read a preset of the package. Raises BenchmarkError if there is none of this name."""
        if name not in preset_names():
            raise BenchmarkError(
                f"preset {name!r} does not exist",
                expected=f"The presets are {', '.join(preset_names())}",
                fix=did_you_mean(name, preset_names()),
            )
        path = files("lora_lite_benchmark") / "presets" / f"{name}.json"
        preset = cls.model_validate_json(path.read_text(encoding="utf-8"))
        if preset.extends is None:
            return preset
        parent = cls.load(preset.extends)
        run = {**parent.run, **preset.run}
        variants = {**parent.variants, **preset.variants}
        return preset.model_copy(update={"run": run, "variants": variants})

    def arm(self, name: str) -> dict[str, Any]:
        """The settings of an arm. Raises BenchmarkError if the preset has none of this name."""
        if name not in self.arms:
            known = ", ".join(repr(arm) for arm in self.arms if arm)
            raise BenchmarkError(
                f"preset {self.name!r} has no arm {name!r}",
                expected=f"Its arms are {known}" if known else "It has no arms",
            )
        return self.arms[name]

    def row(self, row: str) -> PresetRow:
        """What the preset says about a row: under its whole name, else under its variant's."""
        variant, _ = parse_row(row)
        silent = PresetRow()
        return self.variants.get(row, self.variants.get(variant, silent))


def preset_names() -> list[str]:
    folder = files("lora_lite_benchmark") / "presets"
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def parse_row(text: str) -> tuple[str, dict[str, FieldValue]]:
    """`lora:r=4,alpha=8` is the variant `lora` with these fields.

    A value is read as JSON, or taken as text if it is not JSON.
    """
    variant, _, rest = text.partition(":")
    assignments = [item for item in rest.split(",") if item]
    return variant, dict(parse_assignment(item, f"row {text!r}") for item in assignments)


def parse_assignment(text: str, where: str) -> tuple[str, FieldValue]:
    """The field and the value of `field=value`. `where` names the place in an error."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BenchmarkError(
            f"{text!r} in {where} is not an assignment",
            expected="A field is given as name=value, such as r=4",
        )
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    if isinstance(parsed, list | dict):
        return name, value
    return name, parsed


def resolve(
    preset: Preset, row: str, fields: Mapping[str, FieldValue] | None = None, **overrides: Any
) -> RunConfig:
    """The whole config of one row: every default spelt out, local files identified by contents.

    Args:
        preset: where the settings come from.
        row: a variant, with fields and an arm if wanted: `lora:r=4@nf4`. After `peft:`, it is
            PEFT's implementation of it.
        fields: further fields of the variant, which win over all others.
        overrides: settings of RunConfig, which win over the preset's.

    Raises:
        BenchmarkError: a setting is missing, unknown or wrong.
        LoraLiteError: the variant is unknown, or one of its fields is.
    """
    row, _, arm = row.partition("@")
    row, is_peft = row.removeprefix(PEFT_PREFIX), row.startswith(PEFT_PREFIX)
    variant, row_fields = parse_row(row)
    entry = preset.row(row)
    chosen_fields = {**entry.fields, **row_fields, **(fields or {})}
    if is_peft and variant not in SPECIAL_ROWS:
        check_peft(variant, chosen_fields)
    label = (PEFT_PREFIX if is_peft else "") + _label(
        variant, {**row_fields, **(fields or {})}, arm
    )
    values = {
        **preset.run,
        **preset.arm(arm),
        **entry.model_dump(exclude_none=True, exclude={"fields"}),
        **overrides,
        "preset": preset.name,
        "label": label,
        "variant": variant,
        "implementation": "peft" if is_peft else "lora-lite",
        "fields": _all_fields(variant, chosen_fields),
    }
    if "lr" not in values:
        values["lr"] = _default_lr(variant)
    try:
        return RunConfig.model_validate_json(json.dumps(_identify_files(values)))
    except ValidationError as error:
        raise _setting_error(label, error) from None


def _label(variant: str, fields: Mapping[str, FieldValue], arm: str) -> str:
    """The row's name with every field that was asked for: "lora" and r=4 is "lora:r=4"."""
    label = variant
    if fields:
        label += ":" + ",".join(f"{name}={value}" for name, value in fields.items())
    if arm:
        label += f"@{arm}"
    return label


def _all_fields(variant: str, chosen: Mapping[str, FieldValue]) -> dict[str, Any]:
    """The variant's fields with its defaults. The rows without an adapter have none."""
    if variant not in SPECIAL_ROWS:
        return resolved_fields(variant, chosen)
    if chosen:
        raise BenchmarkError(
            f"the row {variant!r} was given the fields {', '.join(chosen)}",
            expected=f"{variant!r} is not a variant and has no fields",
            fix="Leave the fields out",
        )
    return {}


def _default_lr(variant: str) -> float:
    if variant == "base":
        return 0.0
    if variant == "full":
        raise BenchmarkError(
            "the row 'full' has no learning rate",
            expected="Full fine-tuning has no recommended rate; the preset or the command line "
            "must give one",
            fix="Use --lr",
        )
    return recommended_lr(variant)


def _identify_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with absolute paths, and with digests of local and embedded files."""
    result = dict(values)
    for name in SOURCES:
        if source := result.get(name):
            result[name] = _identify_source(source)
    model = str(result.get("model"))
    folder = TASKS[model].model_dir if model in TASKS else Path(model).expanduser()
    if folder.is_dir():
        result["model"] = model if model in TASKS else str(folder.resolve())
        result["model_sha256"] = model_digest(folder)
    return result


def _identify_source(source: Mapping[str, Any]) -> dict[str, Any]:
    if task := TASKS.get(source.get("path", "")):
        return {**source, "sha256": task.edition}
    path = Path(source.get("path", "")).expanduser()
    if path.is_file():
        return {**source, "path": str(path.resolve()), "sha256": sha256(path)}
    return dict(source)


def _setting_error(row: str, error: ValidationError) -> BenchmarkError:
    """The first setting that pydantic objects to."""
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return BenchmarkError(
            f"the row {row!r} has no setting {setting}",
            fix=f"Give {setting} in the preset or on the command line",
        )
    if first["type"] == "extra_forbidden":
        return BenchmarkError(
            f"there is no setting {setting}, which the row {row!r} was given",
            fix=did_you_mean(setting, RunConfig.model_fields),
        )
    return BenchmarkError(
        f"the setting {setting} of the row {row!r} is {first['input']!r}", expected=first["msg"]
    )
