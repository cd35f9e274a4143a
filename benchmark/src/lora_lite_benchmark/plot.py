"""The picture of `lora-lite-bench plot`: accuracy against trainable parameters, as PNG."""

from collections.abc import Sequence
from pathlib import Path

from lora_lite_benchmark.charts import draw_result, figure_of
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.palette import LIGHT, Palette
from lora_lite_benchmark.rows import Group

__all__ = ["save_plot"]

WIDTH, HEIGHT = 8.0, 5.5  # inches


def save_plot(groups: Sequence[Group], path: Path) -> None:
    """Write accuracy, or the loss, against parameters, one panel for each group.

    Raises BenchmarkError if no row has trainable parameters.
    """
    drawn = [group for group in groups if any(row.measured("parameters") for row in group.rows)]
    if not drawn:
        raise BenchmarkError(
            "there is nothing to draw",
            expected="The picture shows rows with trainable parameters, and none has finished",
        )
    palette = Palette(row.config.label for group in drawn for row in group.rows)
    figure = figure_of(WIDTH * len(drawn), HEIGHT)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    figure.subplots_adjust(left=0.08 / len(drawn), right=0.98, bottom=0.1, top=0.93)
    for axes, group in zip(panels, drawn, strict=True):
        axes.grid(alpha=0.3)
        draw_result(axes, group, lambda row: palette.on(row.config.label, LIGHT))
        model = Path(group.rows[0].config.model).name
        what = "accuracy" if group.generates else "loss"
        axes.set_title(f"{model}: {what} ± one standard error", fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
