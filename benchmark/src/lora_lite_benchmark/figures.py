"""The figures of a row: one flat record, of which CSV and JSON hold all and the table shows a part.

Accuracies are shares of 1 and losses are in nats per answer token. `_error` is one standard error,
`_low` and `_high` are the ends of a 95 % interval, and times are in the unit that the name ends in.
None means that a figure does not apply to the row.
"""

from collections.abc import Mapping

from lora_lite_benchmark.families import Family, Judged
from lora_lite_benchmark.results import Measurements
from lora_lite_benchmark.rows import REFERENCE, Group, Row
from lora_lite_benchmark.stats import Scores

__all__ = ["OURS", "UNQUANTISED", "Figures", "figures", "judged_split"]

Figures = dict[str, str | int | float | None]

UNQUANTISED = "unquantised"
OURS = "lora_lite"
"""A row of PEFT's implementation is compared with the row of the same variant and fields here."""


def figures(group: Group) -> tuple[Figures, ...]:
    """All figures of every row. The names are the same for every row."""
    families = {
        REFERENCE: Family(group, group.reference),
        OURS: Family(group, group.ours),
        UNQUANTISED: Family(group, group.unquantised),
    }
    return tuple(_figures(row, group, families) for row in group.rows)


def _figures(row: Row, group: Group, families: Mapping[str, Family]) -> Figures:
    config = row.config
    rank = config.fields.get("r")
    measured = {
        name: row.measured(name) for name in Measurements.model_fields if name != "peak_memory_of"
    }
    found: Figures = {
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
        "forgetting": row.forgotten.value if row.forgotten else None,
        "forgetting_error": row.forgotten.error if row.forgotten else None,
        **measured,
        "peak_memory_of": row.runs[0].measurements.peak_memory_of,
        f"curve_minus_{OURS}": row.curve_against(group.ours(row)),
    }
    for name, family in families.items():
        found |= _difference(name, family.of(row), config.generates)
    return found


def judged_split(row: Figures) -> str:
    """The problems that a row is judged by: the test problems, or else the validation problems."""
    return "test" if row["test_loss"] is not None else "validation"


def _quality(split: str, scores: Scores | None, generates: bool) -> Figures:
    accuracy = scores.accuracy if scores and generates else None
    return {
        f"{split}_accuracy": accuracy.value if accuracy else None,
        f"{split}_accuracy_error": accuracy.error if accuracy else None,
        f"{split}_loss": scores.loss.value if scores else None,
        f"{split}_loss_error": scores.loss.error if scores else None,
    }


def _difference(other: str, judged: Judged | None, generates: bool) -> Figures:
    """Accuracy and loss of the row minus those of `other`, each with the ends of its interval and
    with its p among the differences of all rows.
    """
    found: Figures = {}
    for name in ("accuracy", "loss"):
        applies = judged is not None and (generates or name == "loss")
        difference = getattr(judged.comparison, name) if judged and applies else None
        column = f"{name}_minus_{other}"
        found[column] = difference.value if difference else None
        found[f"{column}_low"] = difference.low if difference else None
        found[f"{column}_high"] = difference.high if difference else None
        found[f"{column}_p"] = getattr(judged.p, name) if judged and applies else None
    return found
