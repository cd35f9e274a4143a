"""The results table of README.md, shortened for the front page and drawn as an SVG picture.

`make docs` runs this file first, so the picture is never older than the table. The picture is
plain SVG. Code hosts show it, where the reader's system chooses light or dark, and so does the
site, whose style sheet follows the site's own switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "results.svg"

WIDTH = 720
ROW_HEIGHT = 24
TOP = 58  # title and subtitle
NAME_END = 138  # names end here, bars begin a little further right
BAR_START = 146
BAR_END = 500  # 100 %
PARAMETERS_END = 700

COLUMNS = ("variant", "test %", "test loss", "parameters", "MACs / token", "file kB")

LEGEND = "grey: the model as it is, and all of its weights trained"

STYLE = """<style>
.results { color: #1f2328; font: 13px system-ui, sans-serif; }
.results text { fill: currentColor; }
.results .title { font-weight: 600; font-size: 14px; }
.results .quiet { opacity: 0.7; }
.results .adapter { fill: #4f6bed; }
.results .whole { fill: #9aa1ab; }
.results .error { stroke: currentColor; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) { .results { color: #e6edf3; } }
</style>"""


@dataclass(frozen=True)
class Result:
    """One row of the table, its cells as they are written there."""

    name: str
    accuracy: str
    loss: str
    parameters: str
    macs: str
    file: str

    @property
    def percent(self) -> float:
        """The share of right answers, in percent."""
        return float(self.accuracy.split("±")[0])

    @property
    def error(self) -> float:
        """One standard error of the share, in percent."""
        return float(self.accuracy.split("±")[1])


def results(readme: str) -> list[Result]:
    """The rows of the results table, best first.

    Raises:
        ValueError: there is no table between the markers, or it lacks a column.
    """
    section = readme.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    lines = [cells(line) for line in section.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError("README.md has no table between <!-- results --> and <!-- /results -->")
    header, _, *rows = lines
    places = [header.index(column) for column in COLUMNS]
    found = [Result(*(row[place] for place in places)) for row in rows]
    return sorted(found, key=lambda result: -result.percent)


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def short_table(rows: list[Result]) -> str:
    """The columns that the front page shows, as a Markdown table."""
    names = ["method", "right answers, %", "loss", "trainable parameters", "MACs per token"]
    lines = [
        [f"`{row.name}`", row.accuracy, row.loss, row.parameters, row.macs, row.file]
        for row in rows
    ]
    rule = ["---"] + ["---:"] * len(names)
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*names, "file, kB"], rule, *lines])


def position(percent: float) -> float:
    """Where a percentage lies, in pixels from the left."""
    return round(BAR_START + (BAR_END - BAR_START) * percent / 100, 1)


def label(text: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    """A text of the picture."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def bar(result: Result, number: int) -> list[str]:
    """Name, bar with one standard error, percentage and number of parameters, as SVG."""
    middle = TOP + ROW_HEIGHT * number + ROW_HEIGHT / 2
    base_line = middle + 4
    end = position(result.percent)
    low, high = position(result.percent - result.error), position(result.percent + result.error)
    kind = "whole" if result.name in ("base", "full") else "adapter"
    box = f'x="{BAR_START}" y="{middle - 7}" width="{round(end - BAR_START, 1)}" height="14"'
    return [
        label(result.name, NAME_END, base_line, anchor="end"),
        f'<rect class="{kind}" {box} rx="2"/>',
        f'<line class="error" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>',
        label(f"{result.percent} ± {result.error}", high + 8, base_line),
        label(result.parameters, PARAMETERS_END, base_line, "quiet", "end"),
    ]


def picture(rows: list[Result]) -> str:
    """The whole picture. No line of it is blank, so that it can stand inside a page."""
    height = TOP + ROW_HEIGHT * len(rows) + 12
    bars = [line for number, result in enumerate(rows) for line in bar(result, number)]
    lines = [
        f'<svg class="results" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' role="img" aria-label="Share of right answers of every variant, best first">',
        STYLE,
        label("Right answers, % (± one standard error)", BAR_START, 20, "title"),
        label("Trainable parameters", PARAMETERS_END, 20, "title", "end"),
        label(LEGEND, BAR_START, 40, "quiet"),
        *bars,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the picture of the table as it is now."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    PICTURE.write_text(picture(results(readme)), encoding="utf-8")


if __name__ == "__main__":
    main()
