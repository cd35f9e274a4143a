"""The comparisons of a group: each row with the reference, with the same row on another base, …

Those of one kind are a family, and are judged together.
"""

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

from lora_lite_benchmark.multiple import SIGNIFICANT, Adjusted, adjusted
from lora_lite_benchmark.rows import Group, Row
from lora_lite_benchmark.stats import Comparison, Paired, comparison_of, paired

__all__ = ["Family", "Judged", "separated_by_loss_alone"]


class Judged(NamedTuple):
    """A row minus another, and how likely such a difference is by chance in the whole family."""

    comparison: Comparison
    p: Adjusted


class Family:
    """Every row of a group against the row that `other` names for it, if it names one."""

    def __init__(self, group: Group, other: Callable[[Row], Row | None]) -> None:
        pairs = [(row, against) for row in group.rows if (against := other(row))]
        self.judged = {
            id(row): Judged(comparison_of(pair), p) for row, _other, pair, p in _judge(pairs)
        }

    def of(self, row: Row) -> Judged | None:
        """None if there is no other row, or no seed that both have."""
        return self.judged.get(id(row))


def separated_by_loss_alone(group: Group) -> list[tuple[str, str]]:
    """The labels of two rows, for every pair of which the losses differ separably and the
    accuracies do not. All pairs are one family. The base is left out.
    """
    trained = [row for row in group.rows if not row.is_base]
    found = [
        (row.config.label, other.config.label)
        for row, other, _pair, p in _judge(combinations(trained, 2))
        if p.loss < SIGNIFICANT <= p.accuracy
    ]
    return list(dict.fromkeys(found))


def _judge(pairs: Iterable[tuple[Row, Row]]) -> list[tuple[Row, Row, Paired, Adjusted]]:
    """The pairs that have a seed in common, as one family."""
    found = [
        (row, other, pair)
        for row, other in pairs
        if (pair := paired(row.judged, other.judged)) is not None
    ]
    ps = adjusted([pair for *_, pair in found])
    return [(*each, p) for each, p in zip(found, ps, strict=True)]
