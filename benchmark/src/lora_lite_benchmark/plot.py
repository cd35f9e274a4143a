"""Pictures of a group of rows, as PNG or as inline SVG.

They show accuracy against trainable parameters, training curves, and costs.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.rows import Group, Row

__all__ = ["accuracy_svg", "costs_svg", "curves_svg", "save_plot"]

WIDTH = 8.0  # inches
HEIGHT = 5.5
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
    "xtick.color": INK,
    "ytick.color": INK,
}
CURVE_POINTS = 40
LABEL_CHARACTERS = 48

Draw = Callable[[Any, Group], None]


def save_plot(groups: Sequence[Group], path: Path) -> None:
    """Write accuracy against parameters as PNG, one panel for each group.

    Raises BenchmarkError if no row has trainable parameters.
    """
    drawn = [group for group in groups if any(row.measured("parameters") for row in group.rows)]
    if not drawn:
        raise BenchmarkError(
            "there is nothing to draw",
            expected="The picture shows rows with trainable parameters, and none has finished",
        )
    figure = _figure(WIDTH * len(drawn), HEIGHT)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, group in zip(panels, drawn, strict=True):
        _draw_accuracy(axes, group)
        model = Path(group.rows[0].config.model).name
        what = "accuracy" if group.generates else "loss"
        axes.set_title(f"{model}: {what} ± one standard error", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def accuracy_svg(group: Group) -> str:
    """Accuracy, or the loss, against trainable parameters, each row with one standard error."""
    return _svg(group, _draw_accuracy)


def curves_svg(group: Group) -> str:
    """The training loss of every row, its mean over the seeds and over stretches of the run."""
    return _svg(group, _draw_curves)


def costs_svg(group: Group) -> str:
    """Forward, backward and peak memory of every row as bars."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _figure(WIDTH, 1.2 + 0.28 * len(group.rows))
        times, memory = figure.subplots(1, 2, sharey=True)
        _draw_times(times, group)
        _draw_memory(memory, group)
        return _inline(figure)


def _svg(group: Group, draw: Draw) -> str:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        draw(axes, group)
        longest = max(len(_label(row)) for row in group.rows)
        figure.legend(
            loc="outside lower center",
            ncols=max(1, 100 // (longest + 6)),
            frameon=False,
            fontsize=8,
        )
        return _inline(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _inline(figure: Any) -> str:
    """The `<svg>` element alone, without ids, which a second picture on the page would repeat."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r' id="\w+_\d+"', "", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")


def _draw_accuracy(axes: Any, group: Group) -> None:
    for row, color in _coloured(group):
        if group.generates:
            value, error = (100 * number for number in row.judged.accuracy)
        else:
            value, error = row.judged.loss
        if row.is_base:
            axes.axhline(value, color="0.5", linestyle="--", linewidth=1, label=_label(row))
        else:
            axes.errorbar(
                row.measured("parameters"),
                value,
                error,
                marker="o",
                capsize=3,
                color=color,
                label=_label(row),
            )
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.margins(x=0.1)
    axes.set_xlabel("trainable parameters")
    split = "test" if group.rows[-1].test else "valid"
    axes.set_ylabel(f"{split} %" if group.generates else f"{split} loss, nats per answer token")
    axes.grid(alpha=0.3)


def _draw_curves(axes: Any, group: Group) -> None:
    for row, color in _coloured(group):
        if row.runs[0].curve:
            axes.plot(*_curve(row), color=color, linewidth=1.4, label=_label(row))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per answer token")
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10 and so on, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


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


def _draw_times(axes: Any, group: Group) -> None:
    labels = [_label(row) for row in group.rows]
    forward = [row.measured("forward_ms") or 0 for row in group.rows]
    backward = [row.measured("backward_ms") or 0 for row in group.rows]
    axes.barh(labels, forward, color="tab:blue", label="forward")
    axes.barh(labels, backward, left=forward, color="tab:orange", label="backward")
    axes.invert_yaxis()
    axes.set_xlabel("ms for one training batch")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _draw_memory(axes: Any, group: Group) -> None:
    axes.barh(
        [_label(row) for row in group.rows],
        [(row.measured("peak_memory_bytes") or 0) / 1e6 for row in group.rows],
    )
    axes.set_xlabel("MB at the peak of training")


def _label(row: Row) -> str:
    """The row's name, cut if it would leave no room for the picture."""
    name = row.config.label
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def _coloured(group: Group) -> list[tuple[Row, Any]]:
    """Every row with its colour, the same in all pictures. After twenty rows colours repeat."""
    import matplotlib as mpl

    colors = mpl.color_sequences["tab20"]
    return [(row, colors[index % len(colors)]) for index, row in enumerate(group.rows)]
