"""Pictures of a group of rows as inline SVG, with colours that follow the theme of the page.

result          accuracy, or the loss, against trainable parameters
forgetting      the loss on the task against what was forgotten, along the adapter's scale
curves          training losses
costs           what a step and a forward take, as ratios to the base's, and the memory
sweep           validation losses against learning rates
sensitivity     how much the loss rises at half and at twice the best rate
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_lite_benchmark.labels import WIDTH as LETTER
from lora_lite_benchmark.labels import Label, at_ends, at_points
from lora_lite_benchmark.palette import Palette
from lora_lite_benchmark.rows import Group, Row
from lora_lite_benchmark.sweep import Choice

__all__ = [
    "costs_svg",
    "curves_svg",
    "draw_result",
    "figure_of",
    "forgetting_svg",
    "result_svg",
    "sensitivity_svg",
    "sweep_svg",
]

WIDE, HIGH = 6.4, 4.4  # inches
DPI = 144
INK = "#010203"
"""The colour of lines and letters. In SVG it becomes `currentColor`, which a page can set for its
light and its dark theme."""

STYLE = {
    # Letters stay letters instead of becoming paths.
    "svg.fonttype": "none",
    # The same picture gives the same bytes.
    "svg.hashsalt": "lora-lite",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
}
CURVE_POINTS = 40
LABEL_CHARACTERS = 30

Color = Callable[[Row], str]


def result_svg(group: Group, palette: Palette) -> str:
    """Accuracy, or the loss, against trainable parameters, each row with one standard error."""
    return _svg(lambda axes: draw_result(axes, group, _sentinels(palette)), palette)


def forgetting_svg(group: Group, palette: Palette) -> str:
    """Learning against forgetting. A line follows the adapter from scale 0, which is the base, to
    the largest that was measured; the point is the adapter as it was trained.
    """

    def draw(axes: Any) -> None:
        color = _sentinels(palette)
        labels: list[Label] = []
        for row in group.rows:
            if row.forgotten is None:
                continue
            at = _path(row)
            if at:
                axes.plot(*zip(*at, strict=True), color=color(row), linewidth=1, alpha=0.6)
            x, y = row.forgotten.value, row.judged.loss.value
            axes.plot(x, y, marker="o", color=color(row))
            labels.append((x, y, _name_of(row), color(row)))
        base = next((row for row in group.rows if row.is_base), None)
        if base is not None:
            axes.axhline(base.judged.loss.value, color=INK, linestyle="--", linewidth=1, alpha=0.5)
            labels.append((0, base.judged.loss.value, "base", INK))
        axes.set_xlabel("rise of the loss on held-out text, nats per token")
        axes.set_ylabel("loss on the task, nats per answer token")
        axes.margins(0.08)
        at_points(axes, labels)

    return _svg(draw, palette)


def curves_svg(group: Group, palette: Palette) -> str:
    """The training loss of every row, its mean over the seeds and over stretches of the run."""
    trained = [row for row in group.rows if row.runs[0].curve]

    def draw(axes: Any) -> None:
        color = _sentinels(palette)
        labels: list[Label] = []
        for row in trained:
            steps, losses = _curve(row)
            axes.plot(steps, losses, color=color(row), linewidth=1.4)
            labels.append((steps[-1], losses[-1], _name_of(row), color(row)))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats per answer token")
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        at_ends(axes, labels)

    longest = max(len(_name_of(row)) for row in trained)
    return _svg(draw, palette, room=longest, height=max(HIGH, 0.17 * len(trained)))


def costs_svg(group: Group, palette: Palette) -> str:
    """The ratios with their quartiles, and the peak of memory, a line for each row."""
    import matplotlib as mpl

    rows = list(group.rows)
    names = [_name_of(row) for row in rows]
    color = _sentinels(palette)
    with mpl.rc_context(STYLE):
        figure = _figure_of_lines(names)
        ratios, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        figure.subplots_adjust(wspace=0.08)
        for place, row in enumerate(rows):
            _draw_ratio(ratios, row, "step_ratio", place, color(row), filled=True)
            _draw_ratio(ratios, row, "inference_ratio", place, color(row), filled=False)
        ratios.axvline(1, color=INK, linestyle="--", linewidth=1, alpha=0.5)
        ratios.set_xlabel("● step and ○ forward, as ratios to the base's")
        peaks = [(row.measured("peak_memory_bytes") or 0) / 1e6 for row in rows]
        memory.barh(range(len(rows)), peaks, height=0.5, color=[color(row) for row in rows])
        memory.set_xlabel("MB at the peak")
        _name_lines(ratios, names)
        memory.tick_params(axis="y", length=0)
        return _inline(figure, palette)


def sweep_svg(choices: Sequence[Choice], palette: Palette) -> str:
    """The validation loss of every trial, the others' fields as chosen, against its rate."""
    names = [choice.row for choice in choices]

    def draw(axes: Any) -> None:
        labels: list[Label] = []
        for choice in choices:
            tint = palette.sentinel(choice.row)
            of_field = [trial for trial in choice.trials if trial.fields == choice.chosen.fields]
            tried = sorted(
                (trial.lr, trial.loss) for trial in of_field if math.isfinite(trial.loss)
            )
            axes.plot(*zip(*tried, strict=True), marker=".", color=tint, linewidth=1.2)
            axes.plot(choice.chosen.lr, choice.chosen.loss, marker="o", color=tint)
            labels.append((choice.chosen.lr, choice.chosen.loss, choice.row, tint))
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss, nats per answer token")
        at_points(axes, labels)

    return _svg(draw, palette, room=max(map(len, names)) // 2)


def sensitivity_svg(choices: Sequence[Choice], palette: Palette) -> str:
    """For each row, how far the loss is above its best at half and at twice the chosen rate."""
    import matplotlib as mpl

    names = [choice.row for choice in choices]
    with mpl.rc_context(STYLE):
        figure = _figure_of_lines(names)
        axes = figure.subplots()
        for place, choice in enumerate(choices):
            tint = palette.sentinel(choice.row)
            rises = {
                mark: loss - choice.chosen.loss
                for factor, mark in ((0.5, "<"), (2.0, ">"))
                if (loss := choice.loss_at(factor)) is not None and math.isfinite(loss)
            }
            if rises:
                axes.plot([0, max(rises.values())], [place, place], color=tint, linewidth=1)
            for mark, rise in rises.items():
                axes.plot(rise, place, marker=mark, color=tint)
        axes.axvline(0, color=INK, linestyle="--", linewidth=1, alpha=0.5)
        _name_lines(axes, names)
        axes.set_xlabel("rise of the loss at half (◂) and at twice (▸) the best rate, nats")
        return _inline(figure, palette)


# --- drawing


def draw_result(axes: Any, group: Group, color: Color) -> None:
    """Accuracy, or the loss, against parameters, with a name at each point."""
    labels: list[Label] = []
    for row in group.rows:
        if group.generates:
            value, error = (100 * number for number in row.judged.accuracy)
        else:
            value, error = row.judged.loss
        if row.is_base:
            axes.axhline(value, color=INK, linestyle="--", linewidth=1, alpha=0.5)
            axes.annotate(
                "base",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                fontsize=9,
            )
            continue
        parameters = row.measured("parameters") or 0
        axes.errorbar(parameters, value, error, marker="o", capsize=3, color=color(row))
        labels.append((parameters, value, _name_of(row), color(row)))
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.autoscale_view()
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("trainable parameters")
    split = "test" if group.rows[-1].test else "valid"
    axes.set_ylabel(f"{split} %" if group.generates else f"{split} loss, nats per answer token")
    at_points(axes, labels)


def _draw_ratio(axes: Any, row: Row, name: str, place: int, tint: str, filled: bool) -> None:
    ratio = row.measured(name)
    if ratio is None:
        return
    low, high = row.measured(f"{name}_low") or ratio, row.measured(f"{name}_high") or ratio
    face = tint if filled else "none"
    height = place + (-0.12 if filled else 0.12)
    axes.plot([low, high], [height, height], color=tint, linewidth=1.2, alpha=0.6)
    axes.plot(ratio, height, marker="o", markersize=5, color=tint, markerfacecolor=face)


def _path(row: Row) -> list[tuple[float, float]]:
    """Forgetting and the loss on the task at each scale, as means over the seeds."""
    runs = [run.forgetting for run in row.runs if run.forgetting is not None]
    if not all(run.scales for run in runs):
        return []
    found = []
    for ats in zip(*(run.scales for run in runs), strict=True):
        start = [run.scales[0].held_out_loss for run in runs]
        rise = _mean([at.held_out_loss - zero for at, zero in zip(ats, start, strict=True)])
        found.append((rise, _mean([at.task_loss for at in ats])))
    return found


def _curve(row: Row) -> tuple[list[float], list[float]]:
    """Steps and losses for at most CURVE_POINTS stretches of the run.

    Each is the mean over the stretch and over the seeds.
    """
    curves = [run.curve for run in row.runs]
    length = math.ceil(len(curves[0]) / CURVE_POINTS)
    steps, losses = [], []
    for start in range(0, len(curves[0]), length):
        stretch = [point for curve in curves for point in curve[start : start + length]]
        steps.append(_mean([point.step for point in stretch]))
        losses.append(_mean([point.loss for point in stretch]))
    return steps, losses


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10 and so on, written out; a long one with fewer."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


# --- figures and their SVG


def _name_of(row: Row) -> str:
    """The row's name, cut if it would leave no room for the picture."""
    name = row.config.label
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _sentinels(palette: Palette) -> Color:
    return lambda row: INK if row.is_base else palette.sentinel(row.config.label)


def _figure_of_lines(names: Sequence[str]) -> Any:
    """A figure with a line for each name, and room for the names at the left."""
    height = 1.1 + 0.26 * len(names)
    figure = figure_of(WIDE, height)
    left = (LETTER * max(map(len, names)) + 14) / 72 / WIDE
    figure.subplots_adjust(left, 0.5 / height, 0.98, 1 - 0.1 / height)
    return figure


def _name_lines(axes: Any, names: Sequence[str]) -> None:
    """Write the names at the left, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _svg(draw: Callable[[Any], None], palette: Palette, room: int = 0, height: float = HIGH) -> str:
    """One picture. `room` is how many letters must fit to the right of it."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = figure_of(WIDE, height)
        axes = figure.subplots()
        right = 1 - (LETTER * room + 16) / 72 / WIDE
        figure.subplots_adjust(left=0.12, bottom=0.13, right=right, top=0.97)
        axes.grid(alpha=0.2)
        draw(axes)
        return _inline(figure, palette)


def _inline(figure: Any, palette: Palette) -> str:
    """The `<svg>` element alone, without ids, which a second picture on the page would repeat."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r' id="\w+_\d+"', "", svg[svg.index("<svg") :])
    return palette.with_variables(svg.replace(INK, "currentColor"))
