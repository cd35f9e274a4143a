"""The figures of a row, by name: one flat record, which CSV and JSON hold whole and the table shows in part.

Accuracies are shares of 1, losses nats per answer token, `_error` one standard error, `_low` and `_high` the ends of a 95 %
interval, times in the unit that the name ends in. None: does not apply.
"""

from itertools import combinations

from lora_lite_benchmark.results import Measurements
from lora_lite_benchmark.rows import REFERENCE, Group, Row
from lora_lite_benchmark.stats import Comparison, Scores

__all__ = ["UNQUANTISED", "Figures", "figures", "separated_by_loss_alone"]

Figures = dict[str, str | int | float | None]

UNQUANTISED = "unquantised"


def figures(row: Row, group: Group) -> Figures:
    """Everything there is to say about `row` in a line; the names are the same for every row."""
    config = row.config
    return {
        "label": config.label,
        "variant": config.variant,
        "model": config.model,
        "quantization": config.quantization,
        "runs": " ".join(run.config.folder for run in row.runs),
        "seeds": " ".join(map(str, row.seeds)) or None,
        "r": None if (rank := config.fields.get("r")) is None else int(rank),
        "lr": None if row.is_base else config.lr,
        "steps": None if row.is_base else config.steps,
        **_quality("test", row.test),
        **_quality("validation", row.validation),
        **{
            name: row.measured(name)
            for name in Measurements.model_fields
            if name != "peak_memory_of"
        },
        "peak_memory_of": row.runs[0].measurements.peak_memory_of,
        **_difference(REFERENCE, row.against(group.reference(row))),
        **_difference(UNQUANTISED, row.against(group.unquantised(row))),
    }


def _quality(split: str, scores: Scores | None) -> Figures:
    names = [f"{split}_{name}" for name in ("accuracy", "accuracy_error", "loss", "loss_error")]
    return dict(
        zip(names, (*scores.accuracy, *scores.loss) if scores else (None,) * 4, strict=True)
    )


def _difference(other: str, comparison: Comparison | None) -> Figures:
    names = [
        f"{name}_minus_{other}{end}"
        for name in ("accuracy", "loss")
        for end in ("", "_low", "_high")
    ]
    values = (*comparison.accuracy, *comparison.loss) if comparison else (None,) * 6
    return dict(zip(names, values, strict=True))


def separated_by_loss_alone(group: Group) -> list[tuple[str, str]]:
    """The labels of rows whose accuracies are not separable although their losses are, the base left out."""
    pairs = combinations([row for row in group.rows if not row.is_base], 2)
    compared = [(one.config.label, two.config.label, one.against(two)) for one, two in pairs]
    found = [
        (one, two)
        for one, two, c in compared
        if c is not None and c.loss.separable and not c.accuracy.separable
    ]
    return list(dict.fromkeys(found))
