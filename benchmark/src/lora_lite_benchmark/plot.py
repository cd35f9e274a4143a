"""One picture: accuracy against trainable parameters, with error bars, and the base as a line."""

from collections.abc import Sequence
from pathlib import Path

from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.results import Result, Split
from lora_lite_benchmark.table import group_results

__all__ = ["save_plot"]


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with one panel for each base model and set of questions.

    Raises BenchmarkError if no row has parameters: the axis would be empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [group for group in group_results(results) if any(result.measurements.parameters for result in group)]
    if not groups:
        raise BenchmarkError("there is nothing to draw: no row with trainable parameters has finished")
    figure = Figure(figsize=(7 * len(groups), 4.8), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        _draw(axes, group)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw(axes, group: Sequence[Result]) -> None:  # type: ignore[no-untyped-def]
    for name in dict.fromkeys(result.config.variant for result in group):
        rows = [result for result in group if result.config.variant == name]
        tested = [_split(result) for result in rows]
        accuracy = [100 * split.accuracy for split in tested]
        if name == "base":
            axes.axhline(accuracy[0], color="0.5", linestyle="--", linewidth=1, label="base")
            continue
        parameters = [result.measurements.parameters for result in rows]
        errors = [100 * split.accuracy_error for split in tested]
        axes.errorbar(parameters, accuracy, yerr=errors, marker="o", linestyle="none", capsize=3, label=name)
        for x, y, result in zip(parameters, accuracy, rows, strict=True):
            label = result.config.label.removeprefix(f"{name}:")
            if label != name:
                axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color="0.3")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("test %" if group[-1].test else "valid %")
    axes.set_title(f"{Path(group[-1].config.model).name}: accuracy ± one standard error", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _split(result: Result) -> Split:
    """What the row is judged on: the test problems, else the validation problems (a config has one of them)."""
    split = result.test or result.validation
    assert split is not None
    return split
