"""The table that a reader sees.

It has a row for each config. There is one table for each base model and set of questions.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_lite_benchmark.config import Source
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.families import separated_by_loss_alone
from lora_lite_benchmark.figures import OURS, UNQUANTISED, Figures, figures
from lora_lite_benchmark.multiple import SIGNIFICANT
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.rows import REFERENCE, Group, group_rows
from lora_lite_benchmark.sentences import sentences

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
"""The cell of a figure that does not apply."""

INSEPARABLE = "≈"
"""The mark of a difference that may be chance, among as many as the table has."""

PAIRS_SHOWN = 6

RATIOS = (
    "a forward with the adapter frozen, and forward with backward, as ratios to the base's, which "
    "took turns with it in one process, with the quartiles of the turns."
)


class Column(NamedTuple):
    """A column: its title, the figures that it shows, and how it shows them.

    If the first of the figures does not apply, the cell says so.
    """

    title: str
    names: tuple[str, ...]
    show: Callable[..., str]

    def cell(self, row: Figures) -> str:
        values = [row[name] for name in self.names]
        return ABSENT if values[0] is None else self.show(*values)


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _rise(value: float, error: float) -> str:
    return f"{value:+.4f} ± {error:.4f}"


def _ratio(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _file_size(full: int, slim: int | None) -> str:
    if slim is None or slim == full:
        return f"{full / 1000:,.0f}"
    return f"{full / 1000:,.0f} (slim {slim / 1000:,.0f})"


def _percent_difference(value: float, low: float, high: float, p: float) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{_mark(p)}"


def _loss_difference(value: float, low: float, high: float, p: float) -> str:
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]{_mark(p)}"


def _mark(p: float) -> str:
    return "" if p < SIGNIFICANT else f" {INSEPARABLE}"


def _with_ends(name: str) -> tuple[str, str, str]:
    """A figure and the two ends of its interval."""
    return name, f"{name}_low", f"{name}_high"


def _with_p(name: str) -> tuple[str, ...]:
    """A difference, the two ends of its interval, and its p."""
    return *_with_ends(name), f"{name}_p"


COLUMNS = (
    Column("variant", ("label",), str),
    Column("seeds", ("seeds",), str),
    Column("r", ("r",), str),
    Column("lr", ("lr",), "{:g}".format),
    Column("steps", ("steps",), "{:,}".format),
    Column("trials", ("trials",), str),
    Column("test %", ("test_accuracy", "test_accuracy_error"), _percent),
    Column("valid %", ("validation_accuracy", "validation_accuracy_error"), _percent),
    Column("test loss", ("test_loss",), "{:.4f}".format),
    Column("valid loss", ("validation_loss",), "{:.4f}".format),
    Column("forgetting", ("forgetting", "forgetting_error"), _rise),
    Column("parameters", ("parameters",), "{:,}".format),
    Column("MACs / token", ("macs_per_token",), "{:,}".format),
    Column("inference ×", _with_ends("inference_ratio"), _ratio),
    Column("step ×", _with_ends("step_ratio"), _ratio),
    Column("calibration s", ("calibration_s",), "{:.2f}".format),
    Column("init s", ("init_s",), "{:.2f}".format),
    Column("peak MB", ("peak_memory_bytes",), _megabytes),
    Column("file kB", ("file_bytes", "slim_file_bytes"), _file_size),
    Column(f"% - {REFERENCE}", _with_p(f"accuracy_minus_{REFERENCE}"), _percent_difference),
    Column(f"loss - {REFERENCE}", _with_p(f"loss_minus_{REFERENCE}"), _loss_difference),
    Column("curve - lora-lite", (f"curve_minus_{OURS}",), "{:.1e}".format),
    Column(f"% - {UNQUANTISED}", _with_p(f"accuracy_minus_{UNQUANTISED}"), _percent_difference),
    Column(f"loss - {UNQUANTISED}", _with_p(f"loss_minus_{UNQUANTISED}"), _loss_difference),
)

ONLY_IF_VARIED = {"seeds", "steps"}
"""Columns that are left out if all rows have the same value. The table's title says it then."""


@dataclass(frozen=True, eq=False)
class Table:
    """The figures of a group, and what is shown of them.

    Attributes:
        figures: those of every row, in full.
        model: the name of the base model.
        tested: what the rows were trained and tested on.
        measures: what the task tells of an adapter; empty if the problems are not embedded ones.
        header: the titles of the columns that are shown.
        cells: a line for each row.
        footnote: what a reader must know of the columns.
    """

    group: Group
    figures: tuple[Figures, ...]
    model: str
    tested: str
    measures: str
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
    rows = figures(group)
    rows = tuple(
        {**row, "sentence": sentence} for row, sentence in zip(rows, sentences(rows), strict=True)
    )
    columns = {column.title: [column.cell(row) for row in rows] for column in COLUMNS}
    shown = {title: cells for title, cells in columns.items() if _is_worth_showing(title, cells)}
    return Table(
        group=group,
        figures=rows,
        model=Path(group.rows[0].config.model).name,
        tested=_tested(group) + _trained(group),
        measures=_measures(group),
        header=tuple(shown),
        cells=tuple(zip(*shown.values(), strict=True)),
        footnote=_footnote(group),
    )


def _is_worth_showing(title: str, cells: Sequence[str]) -> bool:
    values = set(cells) - {ABSENT}
    return len(values) > 1 if title in ONLY_IF_VARIED else bool(values)


def to_markdown(tables: Sequence[Table]) -> str:
    return "\n\n".join(map(_markdown, tables)) + "\n"


def _markdown(table: Table) -> str:
    names_left = ["---" if title == "variant" else "---:" for title in table.header]
    lines = [f"**{table.model}**, {table.tested}", ""]
    if table.measures:
        lines += [table.measures, ""]
    lines.append(f"| {' | '.join(table.header)} |")
    lines.append(f"|{'|'.join(names_left)}|")
    lines += [f"| {' | '.join(cells)} |" for cells in table.cells]
    lines += ["", table.footnote]
    return "\n".join(lines)


def to_csv(tables: Sequence[Table]) -> str:
    """The rows of all tables under one header, every figure in full. None is an empty cell."""
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
    problems = len(group.rows[-1].judged.tokens)
    return f"tested on {problems:,} problems of {Path(_source(group).path).name}"


def _measures(group: Group) -> str:
    task = TASKS.get(_source(group).path)
    return task.measures if task else ""


def _source(group: Group) -> Source:
    """Where the questions come from that the group's rows are compared on."""
    config = group.rows[-1].config
    source = config.test or config.validation
    assert source is not None  # RunConfig asks for one of them
    return source


def _trained(group: Group) -> str:
    """The steps, and the seeds if all rows have the same several ones."""
    trained = [row for row in group.rows if not row.is_base]
    if not trained:
        return ""
    steps = " / ".join(f"{number:,}" for number in sorted({row.config.steps for row in trained}))
    text = f", {steps} steps of {trained[-1].config.batch_size}"
    seeds = trained[0].seeds
    if len(seeds) > 1 and all(row.seeds == seeds for row in trained):
        text += f", seeds {' '.join(map(str, seeds))}"
    return text


def _footnote(group: Group) -> str:
    """One sentence for each thing that a reader must know."""
    runs = [run for row in group.rows for run in row.runs]
    sentences = []
    if any(len(row.seeds) > 1 for row in group.rows):
        sentences.append("± is one standard error of questions and of seeds.")
        sentences.append("Costs are medians over the seeds.")
    else:
        sentences.append("± is one standard error.")
    sentences.append("The loss is in nats per answer token.")
    sentences += _measured(runs)
    sentences += _compared(group)
    sentences += _skipped(runs)
    return " ".join(sentences)


def _measured(runs: Sequence[Result]) -> list[str]:
    """How times, memory and sizes were measured."""
    machines = {
        f"{run.machine['device']} ({run.machine['name']}, {run.machine['threads']} threads)": None
        for run in runs
    }
    where = " and on ".join(machines)
    memory = {run.measurements.peak_memory_of for run in runs}
    return [
        f"Inference × and step × were measured on {where}: {RATIOS}",
        f"The peak of memory is that of the {' or '.join(sorted(memory))} in training.",
        "1 kB is 1,000 bytes.",
    ]


def _compared(group: Group) -> list[str]:
    """What the columns of differences mean, and how much more the loss tells than the accuracy."""
    if not any(group.reference(row) for row in group.rows):
        return []
    sentences = []
    sentences.append(
        f"Differences to {REFERENCE} are on the same questions, with a paired bootstrap interval "
        "of 95 %."
    )
    sentences.append(
        f"{INSEPARABLE} marks one that may be chance among as many as this table has: p is "
        f"{SIGNIFICANT} or more after a step-down max-T correction."
    )
    if not group.generates:
        return sentences
    pairs = separated_by_loss_alone(group)
    if not pairs:
        sentences.append("The loss separates no pair of rows that the accuracy leaves open.")
        return sentences
    named = "; ".join(f"{one} and {two}" for one, two in pairs[:PAIRS_SHOWN])
    more = "" if len(pairs) <= PAIRS_SHOWN else f"; and {len(pairs) - PAIRS_SHOWN} more"
    sentences.append(
        f"Pairs of rows that the loss separates and the accuracy leaves open ({len(pairs)}): "
        f"{named}{more}."
    )
    return sentences


def _skipped(runs: Sequence[Result]) -> list[str]:
    """How many training rows were too long, if any were."""
    run = max(runs, key=lambda run: run.skipped_rows)
    if not run.skipped_rows:
        return []
    limit = run.config.max_tokens
    return [f"{run.skipped_rows:,} training rows of more than {limit:,} tokens were left out."]
