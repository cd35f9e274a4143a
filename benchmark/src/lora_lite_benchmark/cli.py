"""The command `lora-lite-bench`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_lite as ll

from lora_lite_benchmark.config import FieldValue, RunConfig
from lora_lite_benchmark.files import write_text
from lora_lite_benchmark.merge import merge
from lora_lite_benchmark.options import (
    add_run_options,
    add_sweep_options,
    plan,
    sweep_rows,
    varied_fields,
)
from lora_lite_benchmark.preset import Preset, preset_names
from lora_lite_benchmark.results import Result, load_results
from lora_lite_benchmark.rows import Group, group_rows
from lora_lite_benchmark.sweep import choose, has_choices, load_choices, save_choices
from lora_lite_benchmark.sweep_table import sweep_table
from lora_lite_benchmark.table import FORMATS, Table, make_tables, to_markdown

__all__ = ["main"]

TABLE_FILES = {"markdown": "table.md", "csv": "table.csv", "json": "table.json"}
REPORT_FILE = "report.html"
PLOT_FILE = "accuracy.png"

SUCCESS = 0
SOME_FAILED = 1
MISTAKE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit status is 0 if all went well, 1 if some of the runs failed, 2 for a
    mistake in what was asked for, and 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ll.LoraLiteError, OSError) as error:
        from lora_lite_benchmark.processes import is_main_process

        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED


# --- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-lite-bench",
        description="Train variants on questions and answers, and test them on word problems.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train and test rows, and print the table",
        description="Train and test rows of a preset, and print the table.",
    )
    add_run_options(run)
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep",
        help="choose learning rates and fields on validation problems",
        description="Try every row at several learning rates, and further fields if wanted, with "
        "the same number of trials for every row, on validation problems alone.",
    )
    add_sweep_options(sweep)
    sweep.set_defaults(command=_sweep)

    table = commands.add_parser("table", help="print the table of finished runs")
    table.add_argument(
        "--format",
        choices=FORMATS,
        default="markdown",
        help="csv and json hold every figure in full (default: markdown)",
    )
    table.set_defaults(command=_table)

    report = commands.add_parser("report", help="write an HTML page about finished runs")
    report.add_argument(
        "--to", type=Path, metavar="FILE", help=f"the page (default: DIR/{REPORT_FILE})"
    )
    report.set_defaults(command=_report)

    plot = commands.add_parser("plot", help="draw accuracy against parameters of finished runs")
    plot.add_argument(
        "--to", type=Path, metavar="FILE", help=f"the picture (default: DIR/{PLOT_FILE})"
    )
    plot.set_defaults(command=_plot)

    merging = commands.add_parser(
        "merge",
        help="put the finished runs of several directories into one",
        description="Put the finished runs of several directories, of several machines or people, "
        "into one, after checking that they belong together.",
    )
    merging.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    merging.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the directory to make"
    )
    merging.set_defaults(command=_merge)

    for command in (table, report, plot):
        command.add_argument(
            "out", type=Path, metavar="DIR", help="the directory that `run` was given as --out"
        )

    presets = commands.add_parser("presets", help="list the presets and their rows")
    presets.set_defaults(command=_presets)
    return parser


# --- run


def _run(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from lora_lite_benchmark.processes import is_main_process, stop
    from lora_lite_benchmark.series import run_all

    configs = plan(options)
    # Weights load in a moment. The bars that remain are those of training and testing.
    disable_progress_bar()
    if options.estimate:
        return _estimate(configs)
    results, failures = run_all(configs, options.out, _report_outcome)
    if options.settings and is_main_process():
        chosen = load_choices(options.settings)
        save_choices(options.out, options.preset[0], list(chosen.values()))
    stop()
    if is_main_process():
        if results:
            _write_outputs(results, options.out)
        if failures:
            print(
                f"{failures} of {len(configs)} runs failed; see {options.out}/*/error.txt",
                file=sys.stderr,
            )
    return SOME_FAILED if failures else SUCCESS


def _estimate(configs: Sequence[RunConfig]) -> int:
    """Print what the runs would cost, a row after the other."""
    from lora_lite_benchmark.estimate import estimate, estimate_table
    from lora_lite_benchmark.processes import is_main_process, stop

    rows: dict[str, list[RunConfig]] = {}
    for config in configs:
        rows.setdefault(config.row_hash, []).append(config)
    estimates = []
    for number, row in enumerate(rows.values(), start=1):
        if is_main_process():
            print(f"{row[0].label}: row {number} of {len(rows)}", file=sys.stderr, flush=True)
        estimates.append(estimate(row))
    stop()
    if is_main_process():
        print(estimate_table(estimates))
    return SUCCESS


def _sweep(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from lora_lite_benchmark.series import run_all

    disable_progress_bar()
    factors, fields = options.factors, varied_fields(options)
    choices = []
    for row, config, at in sweep_rows(options):

        def trial(lr: float, varied: dict[str, FieldValue], at: Any = at) -> Result | None:
            results, _failures = run_all([at(lr, varied)], options.out, _report_outcome)
            return results[0] if results else None

        choices.append(choose(row, config.lr, factors, fields, trial))
        save_choices(options.out, options.preset[0], choices[-1:])
    print(f"\n{sweep_table(choices)}")
    return SUCCESS


def _report_outcome(config: RunConfig, outcome: Result | Exception) -> None:
    """One line about a run that has ended."""
    name = f"{config.label} (seed {config.seed})"
    if isinstance(outcome, Exception):
        print(f"{name}: failed: {_first_line(outcome)}", file=sys.stderr)
        return
    split = outcome.judged
    accuracy = f"{100 * split.accuracy:.1f} ± {100 * split.accuracy_error:.1f} %, "
    line = f"{name}: {accuracy if config.generates else ''}loss {split.loss:.4f}"
    if outcome.reloaded_identical:
        line += "; reloaded on a fresh base: logits identical"
    print(line, flush=True)


def _first_line(error: Exception) -> str:
    """What an error says. The name of its class tells more where it is not one of lora-lite's."""
    lines = str(error).splitlines()
    message = lines[0] if lines else ""
    if isinstance(error, ll.LoraLiteError):
        return message
    return f"{type(error).__name__}: {message}"


def _write_outputs(results: list[Result], out: Path) -> None:
    """Print the table, and write it in every format, with the page and the picture."""
    tables = make_tables(results)
    print(f"\n{to_markdown(tables)}")
    for name, convert in FORMATS.items():
        write_text(out / TABLE_FILES[name], convert(tables))
    _save_report(tables, out)
    if any(result.measurements.parameters for result in results):
        _save_plot([table.group for table in tables], out / PLOT_FILE)


# --- merge, table, report, plot, presets


def _merge(options: argparse.Namespace) -> int:
    results = merge(options.folders, options.out)
    _write_outputs(results, options.out)
    return SUCCESS


def _table(options: argparse.Namespace) -> int:
    convert = FORMATS[options.format]
    print(convert(make_tables(load_results(options.out))), end="")
    return SUCCESS


def _report(options: argparse.Namespace) -> int:
    _save_report(make_tables(load_results(options.out)), options.out, options.to)
    return SUCCESS


def _save_report(tables: list[Table], out: Path, path: Path | None = None) -> None:
    """Write the page about `out`, with the sweep whose choices are there."""
    from lora_lite_benchmark.report import make_report

    path = path or out / REPORT_FILE
    choices = load_choices(out) if has_choices(out) else {}
    write_text(path, make_report(tables, list(choices.values())))
    print(f"report: {path}")


def _plot(options: argparse.Namespace) -> int:
    _save_plot(group_rows(load_results(options.out)), options.to or options.out / PLOT_FILE)
    return SUCCESS


def _save_plot(groups: list[Group], path: Path) -> None:
    from lora_lite_benchmark.plot import save_plot

    save_plot(groups, path)
    print(f"picture: {path}")


def _presets(_: argparse.Namespace) -> int:
    for name in preset_names():
        _print_preset(Preset.load(name))
    return SUCCESS


def _print_preset(preset: Preset) -> None:
    """The preset's rows and arms, and the settings that it does not share with its parent."""
    inherited = {}
    line = f"{preset.name}: {preset.description}"
    if preset.extends:
        inherited = Preset.load(preset.extends).variants
        line += f" [extends {preset.extends}]"
    print(line)
    print(f"  {'rows':<18}{' '.join(preset.rows)}")
    if any(preset.arms):
        arms = " ".join(arm or "(plain)" for arm in preset.arms)
        print(f"  {'arms':<18}{arms}")
    for row, entry in preset.variants.items():
        if entry == inherited.get(row):
            continue
        others = entry.model_dump(exclude_none=True, exclude={"fields"})
        settings = {**entry.fields, **others}
        listed = ", ".join(f"{key}={value}" for key, value in settings.items())
        print(f"  {row:<18}{listed}")
