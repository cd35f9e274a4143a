"""One self-contained HTML page: the table, pictures, example answers and the exact configs."""

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lora_lite_benchmark.plot import accuracy_svg, costs_svg, curves_svg
from lora_lite_benchmark.results import Outcome, Result
from lora_lite_benchmark.rows import Group, Row
from lora_lite_benchmark.table import Table

__all__ = ["make_report"]

TEMPLATE = "report.html.jinja"
EXAMPLES = 2


class Picture(NamedTuple):
    caption: str
    svg: Markup


def make_report(tables: Sequence[Table]) -> str:
    """The page, which fetches nothing.

    Every text is escaped, also what models wrote. Only the pictures go in as markup.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (files("lora_lite_benchmark") / TEMPLATE).read_text(encoding="utf-8")
    template = environment.from_string(source)
    return template.render(tables=tables, pictures=pictures, examples=examples, config=config)


def pictures(group: Group) -> list[Picture]:
    """The pictures that have something to show. A base alone has no parameters and no curve."""
    costs = Picture("Time of one training batch, and memory.", Markup(costs_svg(group)))
    if all(row.is_base for row in group.rows):
        return [costs]
    accuracy = Picture(
        f"{'Accuracy' if group.generates else 'Test loss'} against trainable parameters, ± one "
        "standard error.",
        Markup(accuracy_svg(group)),
    )
    curves = Picture(
        "Training loss, mean over the seeds and over a fortieth of the run.",
        Markup(curves_svg(group)),
    )
    return [accuracy, curves, costs]


def examples(row: Row) -> list[Outcome]:
    """The first right and the first wrong answers of the row's first run, if it has answered."""
    if not row.config.generates:
        return []
    outcomes = row.runs[0].judged.outcomes
    right = [outcome for outcome in outcomes if outcome.correct]
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    return right[:EXAMPLES] + wrong[:EXAMPLES]


def config(run: Result) -> str:
    """Everything the run depends on, as JSON: its config, the versions and the machine."""
    return run.model_dump_json(include={"hash", "config", "versions", "machine"}, indent=2)
