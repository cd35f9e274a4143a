"""Rows and groups.

A row is the runs of one config with any seeds. A group is the rows that can be compared.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.results import Result, Split
from lora_lite_benchmark.stats import Estimate, Scores, estimate, scores_of

__all__ = ["COMPARABLE", "REFERENCE", "Group", "Row", "group_rows"]

REFERENCE = "lora"
"""The row that the others are compared with: on the same questions, on the same kind of base, and
with the same seeds."""

COMPARABLE = {
    "model",
    "model_sha256",
    "revision",
    "dtype",
    "prompt",
    "test",
    "validation",
    "max_new_tokens",
}
"""The settings that rows must share to be compared."""


@dataclass(frozen=True, eq=False)
class Row:
    """The runs of one config in the order of their seeds. The base has one run, for all seeds."""

    runs: tuple[Result, ...]

    @property
    def config(self) -> RunConfig:
        """The config of the first run. The others differ from it in the seed alone."""
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
        """The scores on the test problems, or on the validation problems if it has no others."""
        scores = self.test or self.validation
        assert scores is not None  # RunConfig asks for one of them
        return scores

    def _scores(self, splits: list[Split | None]) -> Scores | None:
        found = [split.outcomes for split in splits if split is not None]
        return scores_of(found, self.seeds or None) if found else None

    @cached_property
    def forgotten(self) -> Estimate | None:
        """How much the loss on held-out text has risen, in nats a token, as a mean over the seeds;
        None if it was not measured.
        """
        found = [run.forgetting for run in self.runs if run.forgetting is not None]
        if len(found) < len(self.runs):
            return None
        risen = [np.subtract(each.after, each.before) for each in found]
        return estimate(np.stack(risen), np.array(found[0].tokens, dtype=float))

    def measured(self, name: str) -> int | float | None:
        """The median of a measurement over the runs; None if it does not apply to this row.

        Of two runs it is the lower value, so that it is always one that was measured.
        """
        measurements = [getattr(run.measurements, name) for run in self.runs]
        values = [value for value in measurements if value is not None]
        return statistics.median_low(values) if values else None

    def curve_against(self, other: "Row | None") -> float | None:
        """The largest difference of two training losses at the same step and seed, in nats an
        answer token; None if there is no other, or no seed that both have.
        """
        curves = {run.config.seed: run.curve for run in other.runs} if other else {}
        apart = [
            max(abs(one.loss - two.loss) for one, two in zip(run.curve, curves[seed], strict=True))
            for run in self.runs
            if (seed := run.config.seed) in curves
        ]
        return max(apart, default=None)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows on the same base model and the same questions.

    The base comes first. The others are sorted by their number of trainable parameters.
    """

    rows: tuple[Row, ...]

    @property
    def generates(self) -> bool:
        """Whether its rows have answered, so that there is an accuracy."""
        return self.rows[0].config.generates

    def reference(self, row: Row) -> Row | None:
        """The row to compare `row` with; None for the reference itself, or if it is absent."""
        for other in self.rows:
            name, _, _arm = other.config.label.partition("@")
            same_base = other.config.quantization == row.config.quantization
            if name == REFERENCE and same_base and other is not row:
                return other
        return None

    def unquantised(self, row: Row) -> Row | None:
        """The same row on the base that is not quantised; None for a row on that base."""
        return self._with(row, quantization="none")

    def ours(self, row: Row) -> Row | None:
        """The same row as this library computes it; None for such a row."""
        return self._with(row, implementation="lora-lite")

    def _with(self, row: Row, **settings: str) -> Row | None:
        """The other row whose config differs from that of `row` in these settings alone."""
        wanted = row.config.model_copy(update=settings).row_hash
        for other in self.rows:
            if other is not row and other.config.row_hash == wanted:
                return other
        return None


def group_rows(results: Sequence[Result]) -> list[Group]:
    """Make a row of results that differ in the seed alone, and a group of rows that can be
    compared.
    """
    runs_of_a_row: dict[str, list[Result]] = {}
    for result in results:
        runs_of_a_row.setdefault(result.config.row_hash, []).append(result)
    groups: dict[str, list[Row]] = {}
    for runs in runs_of_a_row.values():
        row = Row(tuple(sorted(runs, key=lambda run: run.config.seed)))
        groups.setdefault(_comparable(row.config), []).append(row)
    return [Group(tuple(sorted(rows, key=_order))) for rows in groups.values()]


def _comparable(config: RunConfig) -> str:
    """The same for rows that can be compared, wherever their files lie."""
    settings = {name: value for name, value in config.identity.items() if name in COMPARABLE}
    return json.dumps(settings, sort_keys=True)


def _order(row: Row) -> tuple[bool, int | float, str]:
    return not row.is_base, row.measured("parameters") or 0, row.config.label
