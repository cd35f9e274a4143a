"""The options of `lora-lite-bench run`, and the runs that they ask for."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lite_benchmark.config import SPECIAL_ROWS, SPLITS, FieldValue, RunConfig, Source
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.equal_size import RANK, nearest_rank, parse_count
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.preset import ALL, Preset, parse_assignment, preset_names, resolve
from lora_lite_benchmark.sweep import FACTORS, Choice, load_choices
from lora_lite_benchmark.variants import compared_variants

__all__ = ["add_run_options", "add_sweep_options", "plan", "sweep_rows", "varied_fields"]

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
        "--settings",
        type=Path,
        metavar="DIR|FILE",
        help="the learning rates and fields that a sweep chose",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of every variant in this run; may be repeated",
    )
    run.add_argument(
        "--parameters",
        metavar="COUNT",
        help="give every row the rank at which it comes nearest to so many parameters (8000, 8k); "
        "rows without a rank keep their size",
    )
    run.add_argument("--no-base", action="store_true", help="leave out the row `base`")
    run.add_argument(
        "--no-test",
        action="store_true",
        help="use the validation problems alone, to choose settings",
    )
    run.add_argument(
        "--estimate",
        action="store_true",
        help="measure a few steps and answers of every row, and print what the runs would cost",
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
        "--forgetting",
        metavar="FILE|HUB_ID[:NAME[:SPLIT]]",
        help="held-out text of what the base was trained on, in a column `text`, or problems: its "
        "loss before and after training",
    )
    run.add_argument(
        "--scales",
        type=float,
        nargs="*",
        metavar="SCALE",
        help="scales of the adapter at which forgetting and the loss on the task are measured too",
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


def add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    add_run_options(sweep)
    sweep.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=list(FACTORS),
        metavar="FACTOR",
        help=f"multiples of a row's own learning rate (default: {' '.join(map(str, FACTORS))})",
    )
    sweep.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="further fields to be varied, each with its values, such as r=4,8,16",
    )


def varied_fields(options: argparse.Namespace) -> dict[str, list[FieldValue]]:
    """The fields of `--grid`, each with its values."""
    found: dict[str, list[FieldValue]] = {}
    for text in options.grid:
        name, _, values = text.partition("=")
        each = [f"{name}={value}" for value in values.split(",")]
        found[name] = [parse_assignment(assignment, "--grid")[1] for assignment in each]
    return found


def sweep_rows(options: argparse.Namespace) -> Iterator[tuple[str, RunConfig, Any]]:
    """Every row of a sweep: its name, its config without a choice, and a way to other settings.

    Raises:
        BenchmarkError: there are no validation problems, or not exactly one preset or seed.
    """
    if len(options.preset) != 1 or len(options.seeds) != 1:
        raise BenchmarkError(
            f"a sweep was given {len(options.preset)} presets and {len(options.seeds)} seeds",
            expected="It chooses for one preset, with one seed",
        )
    preset = Preset.load(options.preset[0])
    given = {"validation": None, **_overrides(options, preset)}
    overrides = {**given, "test": None, "seed": options.seeds[0]}
    train = (overrides.get("train") or preset.run["train"])["path"]
    own_task = {"path": train, "split": "validation"} if train in TASKS else {}
    validation = {**(preset.run.get("validation") or own_task), **(overrides["validation"] or {})}
    if "path" not in validation:
        raise BenchmarkError(
            f"the preset {preset.name!r} has no validation problems",
            expected="A sweep looks at validation problems alone",
            fix="Give some with --validation",
        )
    overrides["validation"] = validation
    fields = dict(parse_assignment(text, "--set") for text in options.set)
    for row in _rows(options, preset):
        if row == "base":
            continue
        own = {} if row.partition("@")[0] in SPECIAL_ROWS else fields

        def at(
            lr: float, varied: dict[str, FieldValue], row: str = row, own: Any = own
        ) -> RunConfig:
            return resolve(preset, row, {**own, **varied}, **{**overrides, "lr": lr})

        yield row, resolve(preset, row, own, **overrides), at


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
    choices = load_choices(options.settings) if options.settings else {}
    for row in _rows(options, preset):
        variant, _, own_arm = row.partition("@")
        row_fields = None if variant in SPECIAL_ROWS else fields
        choice = choices.get(row)
        if choice is not None:
            row_fields = {**(row_fields or {}), **choice.chosen.fields} or None
        chosen = {**overrides, **_chosen(choice)}
        if options.parameters:
            wanted = parse_count(options.parameters)
            rank = nearest_rank(resolve(preset, row, row_fields, **chosen), wanted)
            row_fields = row_fields if rank is None else {**(row_fields or {}), RANK: rank}
        for arm in preset.arms:
            name = f"{row}@{arm}" if arm and not own_arm else row
            for seed in options.seeds:
                yield resolve(preset, name, row_fields, **chosen, seed=seed)


def _chosen(choice: Choice | None) -> dict[str, Any]:
    """The settings of a run that a sweep has chosen."""
    if choice is None:
        return {}
    return {"lr": choice.chosen.lr, "trials": len(choice.trials)}


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
    if options.forgetting is not None:
        values["forgetting"] = Source.parse(options.forgetting, "home")
    if options.scales is not None:
        values["scales"] = options.scales
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
    if (options.train or options.test or options.model) and not options.forgetting:
        # The preset's text is of its own model.
        values["forgetting"] = None
    if options.no_test:
        values["test"] = None
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
