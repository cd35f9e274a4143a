"""The choice of learning rates and fields: the same number of trials for every row.

A trial is a run on validation problems alone. Every row gets the same grid, its learning rates as
multiples of the rate that it would have without a choice. The best trial has the lowest loss, in
nats per answer token. Two more trials, at half and at twice its rate, say how much depends on it.

    lr     start x each factor        and every combination of the other fields
    lr/2   and 2 lr                   of the best

Test problems decide nothing. The choices are written to `sweep.json`, which `run --settings` reads.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from lora_lite_benchmark.config import FieldValue, Record
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import write_text
from lora_lite_benchmark.results import Result

__all__ = [
    "FACTORS",
    "Choice",
    "Trial",
    "choose",
    "grid",
    "has_choices",
    "load_choices",
    "save_choices",
]

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Multiples of a row's own rate: half a decade apart, over two decades."""

FILE = "sweep.json"

ROUNDING = 0.01
"""How far two rates that are written with three digits may be apart and still be one."""


class Trial(Record):
    """What one trial came to, on the validation problems.

    Attributes:
        fields: those that the sweep varies.
    """

    lr: float
    fields: dict[str, FieldValue]
    loss: float
    accuracy: float


class Choice(Record):
    """The trials of a row, and what they say.

    Attributes:
        row: its name.
        trials: all of them, the two at half and at twice the best rate included.
        best: the index of the one with the lowest loss on the grid.
        is_at_edge: whether its rate is the lowest or the highest of the grid, so that a better one
            may lie outside.
    """

    row: str
    trials: Annotated[tuple[Trial, ...], Field(min_length=1)]
    best: int
    is_at_edge: bool

    @property
    def chosen(self) -> Trial:
        return self.trials[self.best]

    def loss_at(self, factor: float) -> float | None:
        """The loss at a multiple of the chosen rate, other fields alike; None if not tried."""
        for trial in self.trials:
            is_near = abs(trial.lr / (factor * self.chosen.lr) - 1) < ROUNDING
            if is_near and trial.fields == self.chosen.fields:
                return trial.loss
        return None

    @classmethod
    def of(cls, row: str, trials: Sequence[Trial], on_grid: int) -> "Choice":
        """The choice among the first `on_grid` trials; the others tell what lies around it."""
        best = min(range(on_grid), key=lambda index: trials[index].loss)
        rates = {trial.lr for trial in trials[:on_grid]}
        is_at_edge = len(rates) > 1 and trials[best].lr in (min(rates), max(rates))
        return cls(row=row, trials=tuple(trials), best=best, is_at_edge=is_at_edge)


Run = Callable[[float, dict[str, FieldValue]], Result | None]


def choose(
    row: str,
    start: float,
    factors: Sequence[float],
    fields: Mapping[str, Sequence[FieldValue]],
    run: Run,
) -> Choice:
    """Run every trial of a row.

    Args:
        row: its name.
        start: the learning rate that it has without a choice.
        factors: of that rate.
        fields: further fields to be varied, each with its values.
        run: a trial at a learning rate and with these fields; None if it failed.

    Raises:
        BenchmarkError: every trial failed.
    """
    trials = [_trial(run, lr, chosen) for lr, chosen in grid(start, factors, fields)]
    if all(math.isinf(trial.loss) for trial in trials):
        raise BenchmarkError(
            f"all {len(trials)} trials of {row} failed", fix="See error.txt in the runs' folders"
        )
    on_grid = len(trials)
    choice = Choice.of(row, trials, on_grid)
    tried = {(trial.lr, json.dumps(trial.fields)) for trial in trials}
    for lr in (_rounded(choice.chosen.lr / 2), _rounded(choice.chosen.lr * 2)):
        if (lr, json.dumps(choice.chosen.fields)) not in tried:
            trials.append(_trial(run, lr, choice.chosen.fields))
    return Choice.of(row, trials, on_grid)


def _trial(run: Run, lr: float, fields: dict[str, FieldValue]) -> Trial:
    result = run(lr, fields)
    if result is None or not math.isfinite(result.judged.loss):
        return Trial(lr=lr, fields=fields, loss=math.inf, accuracy=0.0)
    split = result.judged
    return Trial(lr=lr, fields=fields, loss=split.loss, accuracy=split.accuracy)


def _rounded(lr: float) -> float:
    """To three digits, as a person would write it."""
    return float(f"{lr:.3g}")


def grid(
    start: float, factors: Sequence[float], fields: Mapping[str, Sequence[FieldValue]]
) -> Iterator[tuple[float, dict[str, FieldValue]]]:
    """The learning rate and the fields of every trial on the grid; see `choose`."""
    for values in itertools.product(*fields.values()):
        for factor in factors:
            yield _rounded(factor * start), dict(zip(fields, values, strict=True))


# --- the file


class _Sweep(Record):
    """What `sweep.json` holds."""

    preset: str
    choices: tuple[Choice, ...]


def save_choices(out: Path, preset: str, choices: Sequence[Choice]) -> None:
    """Write the choices; those of other rows that are there already stay."""
    path = out / FILE
    kept = load_choices(path) if path.exists() else {}
    kept.update({choice.row: choice for choice in choices})
    sweep = _Sweep(preset=preset, choices=tuple(kept.values()))
    write_text(path, sweep.model_dump_json(indent=1) + "\n")


def has_choices(out: Path) -> bool:
    """Whether a sweep, or a run with its choices, has left them in this directory."""
    return (out / FILE).exists()


def load_choices(path: Path) -> dict[str, Choice]:
    """The choices by row, from `sweep.json` or from the folder that holds it.

    Raises:
        BenchmarkError: there is no such file, or it is something else.
    """
    file = path / FILE if path.is_dir() else path
    try:
        sweep = _Sweep.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError, json.JSONDecodeError) as error:
        raise BenchmarkError(
            f"{file} holds no choices of a sweep: {str(error).splitlines()[0]}",
            fix="Make it with `lora-lite-bench sweep --out DIR`",
        ) from None
    return {choice.row: choice for choice in sweep.choices}
