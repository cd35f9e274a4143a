"""What a table found, in a line: the smallest adapter that does most of what the reference does."""

from collections.abc import Sequence

from lora_lite_benchmark.figures import Figures
from lora_lite_benchmark.multiple import SIGNIFICANT
from lora_lite_benchmark.rows import REFERENCE

__all__ = ["headline"]

MOST = 0.9
"""The share of the reference's gain over the base that counts as most of it."""


def headline(rows: Sequence[Figures]) -> str:
    """The line, from the figures of a table's rows."""
    trained = [row for row in rows if row["variant"] != "base"]
    if not trained:
        return "The base alone was tested."
    near = [
        (row, gain)
        for row in trained
        if (gain := _gain(row, rows)) is not None
        and gain >= MOST
        and row["label"] != REFERENCE
        and row["variant"] != "full"
    ]
    if not near:
        best = min(trained, key=_badness)
        return f"{best['label']} is best, with {_result(best)}{_against_base(rows)}."
    row, gain = min(near, key=lambda found: int(found[0]["parameters"] or 0))
    reference = next(row for row in trained if row["label"] == REFERENCE)
    share = int(row["parameters"] or 0) / int(reference["parameters"] or 1)
    much = f"as much as {REFERENCE}" if gain >= 1 else f"{_percent(gain)} of what {REFERENCE} gains"
    return (
        f"{row['label']} gains {much} over the base, with {row['parameters']:,} "
        f"trained numbers, {_percent(share)} of {REFERENCE}'s."
    )


def _gain(row: Figures, rows: Sequence[Figures]) -> float | None:
    """The gain over the base as a share of the reference's; None where that may be chance."""
    base = next((each for each in rows if each["variant"] == "base"), None)
    reference = next((each for each in rows if each["label"] == REFERENCE), None)
    if base is None or reference is None:
        return None
    metric = "loss" if base[f"{_split(base)}_accuracy"] is None else "accuracy"
    p = base[f"{metric}_minus_{REFERENCE}_p"]
    possible = _badness(base) - _badness(reference)
    if p is None or float(p) >= SIGNIFICANT or possible <= 0:
        return None
    return (_badness(base) - _badness(row)) / possible


def _badness(row: Figures) -> float:
    """The share of wrong answers, or the loss of rows that give none."""
    split = _split(row)
    accuracy = row[f"{split}_accuracy"]
    return 1 - float(accuracy) if accuracy is not None else float(row[f"{split}_loss"] or 0)


def _split(row: Figures) -> str:
    return "test" if row["test_loss"] is not None else "validation"


def _result(row: Figures) -> str:
    split = _split(row)
    accuracy = row[f"{split}_accuracy"]
    if accuracy is not None:
        return f"{100 * float(accuracy):.1f} % right"
    return f"a loss of {float(row[f'{split}_loss'] or 0):.3f}"


def _against_base(rows: Sequence[Figures]) -> str:
    base = next((row for row in rows if row["variant"] == "base"), None)
    return f"; the base has {_result(base)}" if base is not None else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
