"""The figures of a row: one flat record, of which CSV and JSON hold all and the table shows a part.

Accuracies are shares of 1 and losses are in nats per answer token. `_error` is one standard error,
`_low` and `_high` are the ends of a 95 % interval, and times are in the unit that the name ends in.
None means that a figure does not apply to the row.
"""

from itertools import combinations

from lora_lite_benchmark.results import Measurements
from lora_lite_benchmark.rows import REFERENCE, Group, Row
from lora_lite_benchmark.stats import Comparison, Difference, Scores

__all__ = ["OURS", "UNQUANTISED", "Figures", "figures", "separated_by_loss_alone"]

Figures = dict[str, str | int | float | None]

UNQUANTISED = "unquantised"
OURS = "lora_lite"
"""A row of PEFT's implementation is compared with the row of the same variant and fields here."""


def figures(row: Row, group: Group) -> Figures:
    """All figures of `row`. The names are the same for every row."""
    config = row.config
    rank = config.fields.get("r")
    measured = {
        name: row.measured(name) for name in Measurements.model_fields if name != "peak_memory_of"
    }
    return {
        "label": config.label,
        "variant": config.variant,
        "implementation": config.implementation,
        "model": config.model,
        "quantization": config.quantization,
        "runs": " ".join(run.config.folder for run in row.runs),
        "seeds": " ".join(map(str, row.seeds)) or None,
        "r": None if rank is None else int(rank),
        "lr": None if row.is_base else config.lr,
        "steps": None if row.is_base else config.steps,
        "trials": config.trials,
        **_quality("test", row.test, config.generates),
        **_quality("validation", row.validation, config.generates),
        **measured,
        "peak_memory_of": row.runs[0].measurements.peak_memory_of,
        **_difference(REFERENCE, row.against(group.reference(row)), config.generates),
        **_difference(OURS, row.against(group.ours(row)), config.generates),
        f"curve_minus_{OURS}": row.curve_against(group.ours(row)),
        **_difference(UNQUANTISED, row.against(group.unquantised(row)), config.generates),
    }


def _quality(split: str, scores: Scores | None, generates: bool) -> Figures:
    accuracy = scores.accuracy if scores and generates else None
    return {
        f"{split}_accuracy": accuracy.value if accuracy else None,
        f"{split}_accuracy_error": accuracy.error if accuracy else None,
        f"{split}_loss": scores.loss.value if scores else None,
        f"{split}_loss_error": scores.loss.error if scores else None,
    }


def _difference(other: str, comparison: Comparison | None, generates: bool) -> Figures:
    """Accuracy and loss of the row minus those of `other`, each with the ends of its interval."""
    found: Figures = {}
    for name in ("accuracy", "loss"):
        difference: Difference | None = getattr(comparison, name, None)
        if name == "accuracy" and not generates:
            difference = None
        column = f"{name}_minus_{other}"
        found[column] = difference.value if difference else None
        found[f"{column}_low"] = difference.low if difference else None
        found[f"{column}_high"] = difference.high if difference else None
    return found


def separated_by_loss_alone(group: Group) -> list[tuple[str, str]]:
    """The labels of two rows, for every pair of which the losses differ separably and the
    accuracies do not. The base is left out.
    """
    trained = [row for row in group.rows if not row.is_base]
    found: list[tuple[str, str]] = []
    for one, two in combinations(trained, 2):
        comparison = one.against(two)
        if comparison is None:
            continue
        labels = (one.config.label, two.config.label)
        by_loss_alone = comparison.loss.separable and not comparison.accuracy.separable
        if by_loss_alone and labels not in found:
            found.append(labels)
    return found
