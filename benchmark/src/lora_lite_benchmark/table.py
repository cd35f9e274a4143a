"""The table that a reader sees: a row for each config, a table for each base model and set of questions."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_lite_benchmark.figures import UNQUANTISED, Figures, figures, separated_by_loss_alone
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.rows import REFERENCE, Group, group_rows
from lora_lite_benchmark.stats import Difference

__all__ = [
    "COLUMNS",
    "FORMATS",
    "Column",
    "Table",
    "make_tables",
    "to_csv",
    "to_json",
    "to_markdown",
]

ABSENT = "–"
PAIRS_SHOWN = 6


class Column(NamedTuple):
    """What is shown of which figures. Where the first of them is None, the cell says so."""

    title: str
    names: tuple[str, ...]
    show: Callable[..., str]

    def cell(self, row: Figures) -> str:
        values = [row[name] for name in self.names]
        return ABSENT if values[0] is None else self.show(*values)


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _file_size(full: int, slim: int | None) -> str:
    return (
        f"{full / 1000:,.0f}"
        if slim is None or slim == full
        else f"{full / 1000:,.0f} (slim {slim / 1000:,.0f})"
    )


def _interval(unit: int, form: str) -> Callable[[float, float, float], str]:
    def show(value: float, low: float, high: float) -> str:
        middle, *ends = (format(unit * number, form) for number in (value, low, high))
        return f"{middle} [{', '.join(ends)}]" + (
            "" if Difference(value, low, high).separable else " ≈"
        )

    return show


def _differences(other: str) -> tuple[Column, Column]:
    return (
        Column(f"% - {other}", _with_ends(f"accuracy_minus_{other}"), _interval(100, "+.1f")),
        Column(f"loss - {other}", _with_ends(f"loss_minus_{other}"), _interval(1, "+.4f")),
    )


def _with_ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


COLUMNS = (
    Column("variant", ("label",), str),
    Column("seeds", ("seeds",), str),
    Column("r", ("r",), str),
    Column("lr", ("lr",), "{:g}".format),
    Column("steps", ("steps",), "{:,}".format),
    Column("test %", ("test_accuracy", "test_accuracy_error"), _percent),
    Column("valid %", ("validation_accuracy", "validation_accuracy_error"), _percent),
    Column("test loss", ("test_loss",), "{:.4f}".format),
    Column("valid loss", ("validation_loss",), "{:.4f}".format),
    Column("parameters", ("parameters",), "{:,}".format),
    Column("MACs / token", ("macs_per_token",), "{:,}".format),
    Column("forward ms", ("forward_ms",), "{:.1f}".format),
    Column("backward ms", ("backward_ms",), "{:.1f}".format),
    Column("calibration s", ("calibration_s",), "{:.2f}".format),
    Column("init s", ("init_s",), "{:.2f}".format),
    Column("peak MB", ("peak_memory_bytes",), lambda size: f"{size / 1e6:,.0f}"),
    Column("file kB", ("file_bytes", "slim_file_bytes"), _file_size),
    *_differences(REFERENCE),
    *_differences(UNQUANTISED),
)

ONLY_IF_VARIED = {"seeds", "steps"}
"""Columns that are left out where every row says the same; the line above the table says it."""


@dataclass(frozen=True, eq=False)
class Table:
    """A group's figures, and what is shown of them: `header` names the columns, `cells` has a line for each row."""

    group: Group
    figures: tuple[Figures, ...]
    model: str
    tested: str
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    footnote: str

    @property
    def title(self) -> str:
        return f"{self.model}, {self.tested}"


def make_tables(results: Sequence[Result]) -> list[Table]:
    """One table for each group of rows that can be compared."""
    return [_table(group) for group in group_rows(results)]


def _table(group: Group) -> Table:
    rows = tuple(figures(row, group) for row in group.rows)
    columns = {column.title: [column.cell(row) for row in rows] for column in COLUMNS}
    shown = {title: cells for title, cells in columns.items() if _is_worth_showing(title, cells)}
    model = Path(group.rows[0].config.model).name
    cells = tuple(zip(*shown.values(), strict=True))
    return Table(
        group, rows, model, _tested(group) + _trained(group), tuple(shown), cells, _footnote(group)
    )


def _is_worth_showing(title: str, cells: Sequence[str]) -> bool:
    values = set(cells) - {ABSENT}
    return len(values) > 1 if title in ONLY_IF_VARIED else bool(values)


def to_markdown(tables: Sequence[Table]) -> str:
    return "\n\n".join(map(_markdown, tables)) + "\n"


def _markdown(table: Table) -> str:
    rule = "|".join("---" if title == "variant" else "---:" for title in table.header)
    header, *lines = ("| " + " | ".join(line) + " |" for line in (table.header, *table.cells))
    return "\n".join(
        (f"**{table.model}**, {table.tested}", "", header, f"|{rule}|", *lines, "", table.footnote)
    )


def to_csv(tables: Sequence[Table]) -> str:
    """All tables' rows under one header, every figure in full; an empty cell is None."""
    rows = [row for table in tables for row in table.figures]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """A list of tables, each with `title`, `footnote` and `rows`, every figure in full."""
    content = [
        {"title": table.title, "footnote": table.footnote, "rows": table.figures}
        for table in tables
    ]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}


def _tested(group: Group) -> str:
    row = group.rows[-1]
    source = row.config.test or row.config.validation
    assert source is not None
    return f"tested on {len(row.judged.tokens):,} problems of {Path(source.path).name}"


def _trained(group: Group) -> str:
    trained = [row for row in group.rows if not row.is_base]
    if not trained:
        return ""
    steps = " / ".join(f"{number:,}" for number in sorted({row.config.steps for row in trained}))
    seeds = {row.seeds for row in trained}
    several = (
        f", seeds {' '.join(map(str, *seeds))}"
        if len(seeds) == 1 and len(trained[0].seeds) > 1
        else ""
    )
    return f", {steps} steps of {trained[-1].config.batch_size}{several}"


def _footnote(group: Group) -> str:
    runs = [run for row in group.rows for run in row.runs]
    machine, memory = runs[-1].machine, {run.measurements.peak_memory_of for run in runs}
    several = any(len(row.seeds) > 1 for row in group.rows)
    return (
        f"± one standard error{', of questions and of seeds' if several else ''}. Loss in nats per answer token. Times: median "
        f"of one training batch on {machine['device']} ({machine['name']}, {machine['threads']} threads). Peak memory of "
        f"training: {' or '.join(sorted(memory))}. 1 kB = 1,000 bytes.{' Costs: median over the seeds.' if several else ''}"
        f"{_compared(group)}{_skipped(runs)}"
    )


def _compared(group: Group) -> str:
    if not any(group.reference(row) for row in group.rows):
        return ""
    pairs = separated_by_loss_alone(group)
    return (
        f" Differences to {REFERENCE} are on the same questions, with a paired bootstrap interval of 95 %; ≈ marks what is not "
        f"separable from it. Pairs of rows that the share of right answers does not separate, and the paired loss does: "
        f"{len(pairs)}{''.join(f'; {one} and {two}' for one, two in pairs[:PAIRS_SHOWN])}."
    )


def _skipped(runs: Sequence[Result]) -> str:
    """A sentence about training rows that were too long, if there were any."""
    left_out = max(runs, key=lambda run: run.skipped_rows)
    if not left_out.skipped_rows:
        return ""
    return f" {left_out.skipped_rows:,} training rows of more than {left_out.config.max_tokens:,} tokens were left out."
