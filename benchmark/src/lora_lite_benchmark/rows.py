"""Rows: the runs of one config, whatever their seeds. And groups: the rows that can be compared."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.results import Result, Split
from lora_lite_benchmark.stats import Comparison, Scores, compare, scores_of

__all__ = ["REFERENCE", "Group", "Row", "group_rows"]

REFERENCE = "lora"
"""The row that the others are compared with, on the same questions, on the same kind of base and with the same seeds."""


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one config, by seed. The base has one, which no seed changes."""

    runs: tuple[Result, ...]

    @property
    def config(self) -> RunConfig:
        """The first run's: the others' but for the seed."""
        return self.runs[0].config

    @property
    def is_base(self) -> bool:
        return self.config.variant == "base"

    @property
    def seeds(self) -> tuple[int, ...]:
        return () if self.is_base else tuple(run.config.seed for run in self.runs)

    @cached_property
    def test(self) -> Scores | None:
        return self._scores([run.test for run in self.runs])

    @cached_property
    def validation(self) -> Scores | None:
        return self._scores([run.validation for run in self.runs])

    @property
    def judged(self) -> Scores:
        """On the test problems if it has them, else on the validation problems: a config has one of them."""
        scores = self.test or self.validation
        assert scores is not None
        return scores

    def _scores(self, splits: list[Split | None]) -> Scores | None:
        found = [split.outcomes for split in splits if split is not None]
        return scores_of(found, self.seeds or None) if found else None

    def measured(self, name: str) -> int | float | None:
        """The median of a measurement over the runs, the lower one of two; None where it does not apply."""
        values = [
            value for run in self.runs if (value := getattr(run.measurements, name)) is not None
        ]
        return statistics.median_low(values) if values else None

    def against(self, other: "Row | None") -> Comparison | None:
        """The row minus the other; None without another, or without a seed in common."""
        return None if other is None else compare(self.judged, other.judged)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows on the same base model and the same questions: the base first, then by trainable parameters."""

    rows: tuple[Row, ...]

    def reference(self, row: Row) -> Row | None:
        """The row that `row` is compared with; None for the reference itself, and where there is none."""
        for other in self.rows:
            is_reference = other.config.label.partition("@")[0] == REFERENCE and other is not row
            if is_reference and other.config.quantization == row.config.quantization:
                return other
        return None

    def unquantised(self, row: Row) -> Row | None:
        """The same row on the base that is not quantised; None for rows that are on it."""
        wanted = _identity(row.config.model_copy(update={"quantization": "none"}))
        return next(
            (
                other
                for other in self.rows
                if other is not row and _identity(other.config) == wanted
            ),
            None,
        )


def group_rows(results: Sequence[Result]) -> list[Group]:
    """Results with equal configs but for the seed become a row; rows that can be compared, a group."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(_identity(result.config), []).append(result)
    groups: dict[str, list[Row]] = {}
    for runs in rows.values():
        row = Row(tuple(sorted(runs, key=lambda run: run.config.seed)))
        same = {"model", "model_sha256", "revision", "dtype", "prompt", "test", "validation"}
        groups.setdefault(row.config.model_dump_json(include=same), []).append(row)
    return [Group(tuple(sorted(group, key=_order))) for group in groups.values()]


def _identity(config: RunConfig) -> str:
    """The hash that all seeds of a row share."""
    return config.model_copy(update={"seed": 0}).hash


def _order(row: Row) -> tuple[bool, int | float, str]:
    return not row.is_base, row.measured("parameters") or 0, row.config.label
