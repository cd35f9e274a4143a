"""One self-contained HTML page: what was found, the table, pictures, answers and exact configs."""

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lora_lite_benchmark import charts
from lora_lite_benchmark.headline import headline
from lora_lite_benchmark.palette import Palette
from lora_lite_benchmark.results import Outcome, Result
from lora_lite_benchmark.rows import Group, Row
from lora_lite_benchmark.sweep import Choice
from lora_lite_benchmark.table import Table

__all__ = ["make_report"]

TEMPLATE = "report.html.jinja"
EXAMPLES = 2


class Picture(NamedTuple):
    title: str
    caption: str
    svg: str


def make_report(tables: Sequence[Table], choices: Sequence[Choice] = ()) -> str:
    """The page, which fetches nothing. `choices` are those of a sweep.

    Every text is escaped, also what models wrote. Only the pictures go in as markup.
    """
    labels = [row.config.label for table in tables for row in table.group.rows if not row.is_base]
    palette = Palette([*labels, *(choice.row for choice in choices)])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (files("lora_lite_benchmark") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        tables=tables,
        headlines=[headline(table.figures) for table in tables],
        colors=Markup(palette.style_sheet()),
        color_of=lambda row: None if row.is_base else palette.variable(row.config.label),
        pictures=lambda group: _pictures(group, palette),
        sweep=_sweep(choices, palette),
        in_two=_in_two,
        examples=_examples,
        config=_config,
    )


def _pictures(group: Group, palette: Palette) -> list[Picture]:
    """The pictures that have something to show. A base alone has no parameters and no curve."""
    costs = Picture(
        "Costs",
        "Time of one training batch as ratios to the base's, with the quartiles of the turns; the "
        "peak of memory in training.",
        charts.costs_svg(group, palette),
    )
    if all(row.is_base for row in group.rows):
        return [costs]
    result = Picture(
        "Result and size",
        f"{'Accuracy' if group.generates else 'Test loss'} against trainable parameters, ± one "
        "standard error.",
        charts.result_svg(group, palette),
    )
    curves = Picture(
        "Training",
        "Training loss, mean over the seeds and over a fortieth of the run.",
        charts.curves_svg(group, palette),
    )
    forgetting = Picture(
        "Learning and forgetting",
        "A line leads from the base along the scale of the adapter; the point is the adapter as "
        "it was trained. Down is learning, right is forgetting.",
        charts.forgetting_svg(group, palette),
    )
    has_forgotten = any(row.forgotten is not None for row in group.rows)
    return [result, *([forgetting] if has_forgotten else []), curves, costs]


def _sweep(choices: Sequence[Choice], palette: Palette) -> list[Picture]:
    """How the learning rates were chosen, and how much depends on them."""
    if not choices:
        return []
    curves = Picture(
        "Learning rates",
        "Validation loss of every trial; the point is the chosen rate.",
        charts.sweep_svg(choices, palette),
    )
    sensitivity = Picture(
        "Sensitivity",
        "How far the loss rises at half and at twice the best rate.",
        charts.sensitivity_svg(choices, palette),
    )
    return [curves, sensitivity]


def _in_two(cell: str) -> tuple[str, str]:
    """A cell's figure, and what follows it in a second line: its error or its interval."""
    for mark in (" ±", " [", " ("):
        figure, found, rest = cell.partition(mark)
        if found:
            return figure, found + rest
    return cell, ""


def _examples(row: Row) -> list[Outcome]:
    """The first right and the first wrong answers of the row's first run, if it has answered."""
    if not row.config.generates:
        return []
    outcomes = row.runs[0].judged.outcomes
    right = [outcome for outcome in outcomes if outcome.correct]
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    return right[:EXAMPLES] + wrong[:EXAMPLES]


def _config(run: Result) -> str:
    """Everything the run depends on, as JSON: its config, the versions and the machine."""
    return run.model_dump_json(include={"hash", "config", "versions", "machine"}, indent=2)
