"""The command `lora-lite-bench`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_lite as ll

from lora_lite_benchmark.config import (
    ALL,
    SPECIAL_ROWS,
    Preset,
    RunConfig,
    Source,
    parse_assignment,
    preset_names,
    resolve,
)
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_text
from lora_lite_benchmark.results import Result, load_results
from lora_lite_benchmark.rows import Group, group_rows
from lora_lite_benchmark.table import FORMATS, Table, make_tables, to_markdown

__all__ = ["main"]

SETTINGS = (
    "revision", "dtype", "quantization", "prompt", "steps", "batch_size", "micro_batch_size", "lr", "warmup", "weight_decay",
    "clip_norm", "max_tokens", "calibration_rows", "perturb", "max_new_tokens", "eval_batch_size", "checkpoint_every",
)  # fmt: skip
"""Fields of RunConfig that are options of the same name."""

TABLE_FILES = {"markdown": "table.md", "csv": "table.csv", "json": "table.json"}
REPORT_FILE = "report.html"
PLOT_FILE = "accuracy.png"

SPLITS = ("train", "validation", "test")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all went well. 1: a run failed, the others did not. 2: a mistake in what was asked for. 130: interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (BenchmarkError, ll.LoraLiteError, OSError) as error:
        from lora_lite_benchmark.processes import is_main_process

        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-lite-bench",
        description="Train variants on questions and answers, and test them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="train and test rows, print the table",
        description="Train and test rows of a preset.",
    )
    _add_run_options(run)
    run.set_defaults(command=_run)
    table = commands.add_parser("table", help="print the table of finished runs")
    table.add_argument(
        "--format", choices=FORMATS, default="markdown", help="csv and json: every figure in full"
    )
    table.set_defaults(command=_table)
    report = commands.add_parser("report", help="write one HTML page about finished runs")
    report.add_argument(
        "--to", type=Path, metavar="FILE", help="the page (default: DIR/report.html)"
    )
    report.set_defaults(command=_report)
    plot = commands.add_parser("plot", help="draw accuracy against parameters of finished runs")
    plot.add_argument(
        "--to", type=Path, metavar="FILE", help="the picture (default: DIR/accuracy.png)"
    )
    plot.set_defaults(command=_plot)
    for command in (table, report, plot):
        command.add_argument("out", type=Path, metavar="DIR", help="what `run` was given as --out")
    presets = commands.add_parser("presets", help="list the presets and their rows")
    presets.set_defaults(command=_presets)
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--preset", default="tiny", help=f"one of {', '.join(preset_names())} (default: tiny)"
    )
    run.add_argument(
        "--variants", nargs="+", metavar="ROW",
        help="installed variants, with fields if wanted (lora:r=4,alpha=8), in one arm of the preset if wanted (lora@nf4); "
        "also `base`, `full` (every weight trained) and `all` (every installed variant). Default: the preset's rows",
    )  # fmt: skip
    run.add_argument(
        "--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: bench-out"
    )
    run.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of every variant in this run",
    )
    run.add_argument("--no-base", action="store_true", help="leave out the base row")
    run.add_argument(
        "--no-test",
        action="store_true",
        help="judge on the validation problems alone (to choose settings)",
    )
    run.add_argument("--model", metavar="DIR|HUB_ID", help="local directory, hub id, or `tiny`")
    for split in SPLITS:
        run.add_argument(
            f"--{split}",
            metavar="FILE|HUB_ID[:NAME[:SPLIT]]",
            help="JSON lines, a dataset of the hub, or `tiny`",
        )
        run.add_argument(f"--{split}-count", type=int, metavar="N", help="only the first N rows")
    run.add_argument(
        "--targets", nargs="+", metavar="REGEX", help="the layers to adapt, by module path"
    )
    run.add_argument("--exclude", nargs="+", metavar="REGEX")
    run.add_argument("--layers", type=int, nargs="+", metavar="INDEX")
    for name in SETTINGS:
        run.add_argument(
            f"--{name.replace('_', '-')}", metavar=_kind(name), help="overrides the preset"
        )


def _kind(setting: str) -> str:
    annotation = str(RunConfig.model_fields[setting].annotation)
    return next(
        (kind.upper() for kind in ("float32", "int", "float") if kind in annotation), "TEXT"
    ).replace("FLOAT32", "DTYPE")


def _run(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from lora_lite_benchmark.processes import is_main_process, stop
    from lora_lite_benchmark.run import run_all

    configs = plan(options)
    disable_progress_bar()  # of loading weights; those of training and testing are this package's
    results, failures = run_all(configs, options.out, _say)
    stop()
    if not is_main_process():
        return 1 if failures else 0
    if results:
        _write_outputs(results, options.out)
    if failures:
        print(
            f"{failures} of {len(configs)} runs failed; see {options.out}/*/error.txt",
            file=sys.stderr,
        )
    return 1 if failures else 0


def plan(options: argparse.Namespace) -> list[RunConfig]:
    """Every run that the options ask for, each once, the base first."""
    preset = Preset.load(options.preset)
    overrides = _overrides(options, preset)
    fields = dict(parse_assignment(text, "--set") for text in options.set)
    rows = [
        row
        for name in options.variants or preset.rows
        for row in (sorted(ll.variants()) if name == ALL else [name])
    ]
    if not rows:
        raise BenchmarkError("no variant is installed; for a first one: pip install lora-lite-lora")
    runs: dict[str, RunConfig] = {}
    for row in rows if options.no_base else ["base", *rows]:
        for arm in preset.arms:
            name = f"{row}@{arm}" if arm and "@" not in row else row
            for seed in options.seeds:
                config = resolve(
                    preset,
                    name,
                    None if row.partition("@")[0] in SPECIAL_ROWS else fields,
                    **overrides,
                    seed=seed,
                )
                runs.setdefault(config.hash, config)
    return list(runs.values())


def _overrides(options: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """RunConfig's fields as the command line gives them."""
    values: dict[str, Any] = {
        name: _json_or_text(text)
        for name in SETTINGS
        if (text := getattr(options, name)) is not None
    }
    for name in ("model", "targets", "exclude", "layers"):
        if (value := getattr(options, name)) is not None:
            values[name] = value
    for split in SPLITS:
        if (text := getattr(options, split)) is not None:
            values[split] = Source.parse(text, split)
        if (count := getattr(options, f"{split}_count")) is not None:
            values[split] = {**(values.get(split) or preset.run.get(split) or {}), "count": count}
    if options.model:  # what the preset leaves out is of its own model
        values.setdefault("layers", None)
        values.setdefault("exclude", None)
    if (options.train or options.test) and not options.validation:
        values["validation"] = None  # the preset's would be other questions
    if options.no_test:
        values["test"] = None
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _say(config: RunConfig, outcome: Result | Exception) -> None:
    name = f"{config.label} (seed {config.seed})"
    if isinstance(outcome, Exception):
        first = (str(outcome).splitlines() or [""])[0]
        kind = (
            ""
            if isinstance(outcome, (BenchmarkError, ll.LoraLiteError))
            else f"{type(outcome).__name__}: "
        )
        print(f"{name}: failed: {kind}{first}", file=sys.stderr)
        return
    split = outcome.judged
    text = f"{name}: {100 * split.accuracy:.1f} ± {100 * split.accuracy_error:.1f} %, loss {split.loss:.4f}"
    if outcome.reloaded_identical:
        text += "; reloaded on a fresh base: logits identical"
    print(text, flush=True)


def _write_outputs(results: list[Result], out: Path) -> None:
    """Print the table, and leave it in `out` in every format, with the page and the picture."""
    tables = make_tables(results)
    print(f"\n{to_markdown(tables)}")
    for name, convert in FORMATS.items():
        write_text(out / TABLE_FILES[name], convert(tables))
    _save_report(tables, out / REPORT_FILE)
    if any(result.measurements.parameters for result in results):
        _save_plot([table.group for table in tables], out / PLOT_FILE)


def _table(options: argparse.Namespace) -> int:
    print(FORMATS[options.format](make_tables(load_results(options.out))), end="")
    return 0


def _report(options: argparse.Namespace) -> int:
    _save_report(make_tables(load_results(options.out)), options.to or options.out / REPORT_FILE)
    return 0


def _save_report(tables: list[Table], path: Path) -> None:
    from lora_lite_benchmark.report import make_report

    write_text(path, make_report(tables))
    print(f"report: {path}")


def _plot(options: argparse.Namespace) -> int:
    _save_plot(group_rows(load_results(options.out)), options.to or options.out / PLOT_FILE)
    return 0


def _save_plot(groups: list[Group], path: Path) -> None:
    from lora_lite_benchmark.plot import save_plot

    save_plot(groups, path)
    print(f"picture: {path}")


def _presets(_: argparse.Namespace) -> int:
    for name in preset_names():
        preset = Preset.load(name)
        parent = Preset.load(preset.extends).variants if preset.extends else {}
        print(
            f"{name}: {preset.description}"
            + (f" [extends {preset.extends}]" if preset.extends else "")
        )
        print(f"  {'rows':<18}" + " ".join(preset.rows))
        if any(preset.arms):
            print(f"  {'arms':<18}" + " ".join(arm or "(plain)" for arm in preset.arms))
        for row, entry in preset.variants.items():
            if entry == parent.get(row):
                continue
            settings = {**entry.fields, **entry.model_dump(exclude_none=True, exclude={"fields"})}
            print(f"  {row:<18}" + ", ".join(f"{key}={value}" for key, value in settings.items()))
    return 0
