"""The options of `lora-lite-bench run`, and the runs that they ask for."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lite_benchmark.config import SPECIAL_ROWS, SPLITS, RunConfig, Source
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.preset import ALL, Preset, parse_assignment, preset_names, resolve
from lora_lite_benchmark.variants import compared_variants

__all__ = ["add_run_options", "plan"]

SETTINGS = (
    "revision",
    "dtype",
    "quantization",
    "prompt",
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
    "max_new_tokens",
    "eval_batch_size",
    "checkpoint_every",
)
"""Fields of RunConfig that are options of the same name."""


def add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--preset",
        nargs="+",
        default=["tiny"],
        help=f"one or several of {', '.join(preset_names())} (default: tiny)",
    )
    run.add_argument(
        "--variants",
        nargs="+",
        metavar="ROW",
        help="installed variants, with fields if wanted (lora:r=4,alpha=8), in one arm of the "
        "preset if wanted (lora@nf4); also `base`, `full` (every weight is trained) and `all` "
        "(every installed variant). Default: the rows of the preset",
    )
    run.add_argument(
        "--out",
        type=Path,
        default=Path("bench-out"),
        metavar="DIR",
        help="where results go (default: bench-out)",
    )
    run.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of every variant in this run; may be repeated",
    )
    run.add_argument("--no-base", action="store_true", help="leave out the row `base`")
    run.add_argument(
        "--no-test",
        action="store_true",
        help="use the validation problems alone, to choose settings",
    )
    run.add_argument(
        "--model", metavar="DIR|HUB_ID", help="a local directory, a hub id, `tiny` or `skill`"
    )
    for split in SPLITS:
        run.add_argument(
            f"--{split}",
            metavar="FILE|HUB_ID[:NAME[:SPLIT]]",
            help="a JSON-lines file, a dataset of the hub, `tiny` or `skill`",
        )
        run.add_argument(
            f"--{split}-count", type=int, metavar="N", help=f"only the first N {split} rows"
        )
    run.add_argument(
        "--targets", nargs="+", metavar="REGEX", help="the layers to adapt, by module path"
    )
    run.add_argument(
        "--exclude", nargs="+", metavar="REGEX", help="layers not to adapt, by module path"
    )
    run.add_argument("--layers", type=int, nargs="+", metavar="INDEX", help="the blocks to adapt")
    for name in SETTINGS:
        option = name.replace("_", "-")
        run.add_argument(f"--{option}", metavar=_metavar(name), help="overrides the preset")


def _metavar(setting: str) -> str:
    """The kind of value that a setting takes, for the help text."""
    annotation = str(RunConfig.model_fields[setting].annotation)
    for kind, metavar in (("float32", "DTYPE"), ("int", "INT"), ("float", "FLOAT")):
        if kind in annotation:
            return metavar
    return "TEXT"


def plan(options: argparse.Namespace) -> list[RunConfig]:
    """Every run that the options ask for, each once: a preset after the other, its base first."""
    runs: dict[str, RunConfig] = {}
    for name in options.preset:
        for config in _plan_preset(options, Preset.load(name)):
            runs.setdefault(config.hash, config)
    return list(runs.values())


def _plan_preset(options: argparse.Namespace, preset: Preset) -> Iterator[RunConfig]:
    overrides = _overrides(options, preset)
    fields = dict(parse_assignment(text, "--set") for text in options.set)
    for row in _rows(options, preset):
        variant, _, own_arm = row.partition("@")
        row_fields = None if variant in SPECIAL_ROWS else fields
        for arm in preset.arms:
            name = f"{row}@{arm}" if arm and not own_arm else row
            for seed in options.seeds:
                yield resolve(preset, name, row_fields, **overrides, seed=seed)


def _rows(options: argparse.Namespace, preset: Preset) -> list[str]:
    """The names of the rows, with `all` spelt out."""
    rows: list[str] = []
    for name in options.variants or preset.rows:
        rows += compared_variants() if name == ALL else [name]
    if not rows:
        raise BenchmarkError(
            "no variant is installed",
            expected="The rows of the preset are all installed variants",
            fix="For a first one, run pip install lora-lite-lora",
        )
    return rows if options.no_base else ["base", *rows]


def _overrides(options: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """The fields of RunConfig that the command line gives."""
    values: dict[str, Any] = {}
    for name in SETTINGS:
        text = getattr(options, name)
        if text is not None:
            values[name] = _json_or_text(text)
    for name in ("model", "targets", "exclude", "layers"):
        value = getattr(options, name)
        if value is not None:
            values[name] = value
    for split in SPLITS:
        text = getattr(options, split)
        count = getattr(options, f"{split}_count")
        if text is not None:
            values[split] = Source.parse(text, split)
        if count is not None:
            source = values.get(split) or preset.run.get(split) or {}
            values[split] = {**source, "count": count}
    if options.model:
        # What the preset leaves out belongs to its own model.
        values.setdefault("layers", None)
        values.setdefault("exclude", None)
    if (options.train or options.test) and not options.validation:
        # The preset's validation problems would be of another kind.
        values["validation"] = None
    if options.no_test:
        values["test"] = None
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
