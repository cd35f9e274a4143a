"""The markdown table that a reader sees: a row a run, a table for each base model and set of questions."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_lite_benchmark.results import Result, Split

__all__ = ["COLUMNS", "format_table", "group_results", "row_order"]

ABSENT = "–"

Column = tuple[str, Callable[[Result], str]]


def _percent(split: Split | None) -> str:
    return ABSENT if split is None else f"{100 * split.accuracy:.1f} ± {100 * split.accuracy_error:.1f}"


def _loss(split: Split | None) -> str:
    return ABSENT if split is None else f"{split.loss:.4f}"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _file_size(result: Result) -> str:
    full, slim = result.measurements.file_bytes, result.measurements.slim_file_bytes
    if full is None:
        return ABSENT
    return f"{full / 1000:,.0f}" if slim is None or slim == full else f"{full / 1000:,.0f} (slim {slim / 1000:,.0f})"


COLUMNS: tuple[Column, ...] = (
    ("variant", lambda result: result.config.label),
    ("seed", lambda result: ABSENT if result.config.variant == "base" else str(result.config.seed)),
    ("r", lambda result: str(result.config.fields.get("r", ABSENT))),
    ("lr", lambda result: ABSENT if result.config.variant == "base" else f"{result.config.lr:g}"),
    ("steps", lambda result: ABSENT if result.config.variant == "base" else f"{result.config.steps:,}"),
    ("test %", lambda result: _percent(result.test)),
    ("valid %", lambda result: _percent(result.validation)),
    ("test loss", lambda result: _loss(result.test)),
    ("valid loss", lambda result: _loss(result.validation)),
    ("parameters", lambda result: f"{result.measurements.parameters:,}"),
    ("MACs / token", lambda result: f"{result.measurements.macs_per_token:,}"),
    ("forward ms", lambda result: f"{result.measurements.forward_ms:.1f}"),
    ("backward ms", lambda result: _number(result.measurements.backward_ms, ".1f")),
    ("init s", lambda result: _number(result.measurements.init_s, ".2f")),
    ("peak MB", lambda result: f"{result.measurements.peak_memory_bytes / 1e6:,.0f}"),
    ("file kB", _file_size),
)

ONLY_IF_VARIED = {"seed", "steps"}
"""Columns that are left out where every row says the same."""


def format_table(results: Sequence[Result]) -> str:
    """The tables of all groups, each under a line that says what was run on what."""
    return "\n\n".join(_one_table(group) for group in group_results(results)) + "\n"


def group_results(results: Sequence[Result]) -> list[list[Result]]:
    """Results that can be compared: the same base model and the same questions. Each group is in row order."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        config = result.config
        key = config.model_dump_json(include={"model", "model_sha256", "revision", "dtype", "prompt", "test", "validation"})
        groups.setdefault(key, []).append(result)
    return [sorted(group, key=row_order) for group in groups.values()]


def row_order(result: Result) -> tuple[bool, int, str, int]:
    """The base first, then by trainable parameters."""
    return result.config.variant != "base", result.measurements.parameters, result.config.label, result.config.seed


def _one_table(results: Sequence[Result]) -> str:
    cells = {name: [show(result) for result in results] for name, show in COLUMNS}
    shown = {name: column for name, column in cells.items() if _is_worth_showing(name, column)}
    lines = ["| " + " | ".join(shown) + " |", "|" + "|".join("---" if name == "variant" else "---:" for name in shown) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return f"{_title(results)}\n\n" + "\n".join(lines) + f"\n\n{_footnote(results)}"


def _is_worth_showing(name: str, column: list[str]) -> bool:
    values = set(column) - {ABSENT}
    return len(values) > 1 if name in ONLY_IF_VARIED else bool(values)


def _title(results: Sequence[Result]) -> str:
    last = results[-1]
    split, source = (last.test, last.config.test) if last.test else (last.validation, last.config.validation)
    count, name = (len(split.outcomes), Path(source.path).name) if split and source else (0, "")
    steps = sorted({result.config.steps for result in results if result.config.variant != "base"})
    trained = f", {' / '.join(f'{number:,}' for number in steps)} steps of {last.config.batch_size}" if steps else ""
    return f"**{Path(last.config.model).name}**, tested on {count:,} problems of {name}{trained}"


def _footnote(results: Sequence[Result]) -> str:
    machine, memory = results[-1].machine, {result.measurements.peak_memory_of for result in results}
    return (
        f"± one standard error. Loss in nats per answer token. Times: median of one training batch on {machine['device']} "
        f"({machine['name']}, {machine['threads']} threads). Peak memory of training: {' or '.join(sorted(memory))}. "
        f"1 kB = 1,000 bytes.{_skipped(results)}"
    )


def _skipped(results: Sequence[Result]) -> str:
    """A sentence about training rows that were too long, if there were any."""
    left_out = max(results, key=lambda result: result.skipped_rows)
    if not left_out.skipped_rows:
        return ""
    return f" {left_out.skipped_rows:,} training rows of more than {left_out.config.max_tokens:,} tokens were left out."
