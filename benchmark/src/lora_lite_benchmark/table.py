"""The markdown table that a reader sees: a row a run, a table for each base model and set of questions."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from lora_lite_benchmark.results import Result, Split
from lora_lite_benchmark.stats import Comparison, Difference, compare, scores_of

__all__ = ["COLUMNS", "format_table", "group_results", "row_order"]

ABSENT = "–"
REFERENCE = "lora"
"""The row that the others are compared with, on the same questions, on the same kind of base and with the same seed."""
DENSE = "unquantised"
PAIRS_SHOWN = 6

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
    ("calibration s", lambda result: _number(result.measurements.calibration_s, ".2f")),
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
    for name, other in ((REFERENCE, _reference), (DENSE, _dense)):
        compared = [_compare(result, other(result, results)) for result in results]
        cells[f"% - {name}"] = [ABSENT if c is None else _difference(c.accuracy, 100, "+.1f") for c in compared]
        cells[f"loss - {name}"] = [ABSENT if c is None else _difference(c.loss, 1, "+.4f") for c in compared]
    shown = {name: column for name, column in cells.items() if _is_worth_showing(name, column)}
    lines = ["| " + " | ".join(shown) + " |", "|" + "|".join("---" if name == "variant" else "---:" for name in shown) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return f"{_title(results)}\n\n" + "\n".join(lines) + f"\n\n{_footnote(results)}"


def _reference(result: Result, results: Sequence[Result]) -> Result | None:
    """None for the reference itself, and where none of the same seed is at hand."""
    for other in results:
        is_reference = other.config.label.partition("@")[0] == REFERENCE and other is not result
        same_seed = result.config.variant == "base" or other.config.seed == result.config.seed
        if is_reference and same_seed and other.config.quantization == result.config.quantization:
            return other
    return None


def _dense(result: Result, results: Sequence[Result]) -> Result | None:
    """The same row on the base that is not quantised; None for rows that are on it."""
    wanted = result.config.model_copy(update={"quantization": "none"}).hash
    return next((other for other in results if other is not result and other.config.hash == wanted), None)


def _compare(result: Result, other: Result | None) -> Comparison | None:
    return None if other is None else compare(scores_of(result), scores_of(other))


def _difference(difference: Difference, unit: int, form: str) -> str:
    value, low, high = (format(unit * number, form) for number in difference)
    return f"{value} [{low}, {high}]" + ("" if difference.separable else " ≈")


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
        f"1 kB = 1,000 bytes.{_compared(results)}{_skipped(results)}"
    )


def _compared(results: Sequence[Result]) -> str:
    if not any(_reference(result, results) for result in results):
        return ""
    pairs = separated_by_loss_alone(results)
    return (
        f" Differences to {REFERENCE} are on the same questions, with a paired bootstrap interval of 95 %; ≈ marks what is not "
        f"separable from it. Pairs of rows that the share of right answers does not separate, and the paired loss does: "
        f"{len(pairs)}{''.join(f'; {one} and {two}' for one, two in pairs[:PAIRS_SHOWN])}."
    )


def separated_by_loss_alone(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The labels of rows, of one seed each, whose accuracies are not separable although their losses are, the base left out."""
    rows = [(result, scores_of(result)) for result in results if result.config.variant != "base"]
    compared = [
        (one.config.label, two.config.label, compare(first, second)) for (one, first), (two, second) in combinations(rows, 2)
    ]
    found = [(one, two) for one, two, c in compared if c is not None and c.loss.separable and not c.accuracy.separable]
    return list(dict.fromkeys(found))


def _skipped(results: Sequence[Result]) -> str:
    """A sentence about training rows that were too long, if there were any."""
    left_out = max(results, key=lambda result: result.skipped_rows)
    if not left_out.skipped_rows:
        return ""
    return f" {left_out.skipped_rows:,} training rows of more than {left_out.config.max_tokens:,} tokens were left out."
