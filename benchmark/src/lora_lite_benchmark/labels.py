"""Names beside what they name, in the place of legends: at points, and at the ends of lines."""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Label", "at_ends", "at_points"]

SIZE = 9  # points
LINE = 11.0
"""The height of a label, in points of which SIZE are letters."""
WIDTH = 5.4
"""The width of a letter."""

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Where a label may stand beside its point, the best first."""

Label = tuple[float, float, str, Any]
"""x and y in the units of the data, the text, its colour."""

Box = tuple[float, float, float, float]


def at_points(axes: Any, labels: Sequence[Label]) -> None:
    """Write each label near its point, where it covers no other point and no other label.

    If there is no such place, it takes the one where it covers least.
    """
    points = _in_points(axes, labels)
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    left, bottom, right, top = _frame(axes)
    for (x, y), (data_x, data_y, text, color) in zip(points, labels, strict=True):
        width = WIDTH * len(text)

        def cost(box: Box) -> float:
            outside = max(0.0, box[2] - right, left - box[0]) + max(
                0.0, box[3] - top, bottom - box[1]
            )
            return sum(_overlap(box, other) for other in taken) + 100 * outside

        boxes = list(_places(x, y, width))
        best = min(boxes, key=cost)
        taken.append(best)
        dx, dy = best[0] - x, best[1] + LINE / 2 - y
        is_far = boxes.index(best) >= len(DIRECTIONS)
        axes.annotate(
            text,
            (data_x, data_y),
            xytext=(dx, dy),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6} if is_far else None,
        )


def at_ends(axes: Any, labels: Sequence[Label]) -> None:
    """Write each label to the right of the end of its line, none over another."""
    points = _in_points(axes, labels)
    order = sorted(range(len(labels)), key=lambda index: points[index][1])
    heights = [points[index][1] for index in order]
    for _ in range(200):
        for lower in range(len(heights) - 1):
            gap = LINE - (heights[lower + 1] - heights[lower])
            if gap > 0:
                heights[lower] -= gap / 2
                heights[lower + 1] += gap / 2
    for index, height in zip(order, heights, strict=True):
        x, y, text, color = labels[index]
        axes.annotate(
            text,
            (x, y),
            xytext=(8, height - points[index][1]),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            color=color,
            annotation_clip=False,
        )


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Where a label may stand, the nearest first: right, left, above, below, and further away."""
    for distance in (5.0, 12.0, 22.0, 34.0, 48.0):
        for dx, dy in DIRECTIONS:
            start = x + dx * distance - (width if dx < 0 else width / 2 if dx == 0 else 0)
            middle = y + dy * (distance + LINE / 4)
            yield (start, middle - LINE / 2, start + width, middle + LINE / 2)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _in_points(axes: Any, labels: Sequence[Label]) -> list[tuple[float, float]]:
    """Where the data lie on the picture, in points, as the axes are at present."""
    scale = 72 / axes.figure.dpi
    pixels = axes.transData.transform([(x, y) for x, y, *_ in labels]) if labels else []
    return [(float(x) * scale, float(y) * scale) for x, y in pixels]


def _frame(axes: Any) -> Box:
    scale = 72 / axes.figure.dpi
    box = axes.get_window_extent()
    return box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale
