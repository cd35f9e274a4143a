"""What a table found, in a line: the smallest adapter that does most of what the reference does."""

from collections.abc import Sequence

from lora_lite_benchmark.figures import Figures, judged_split
from lora_lite_benchmark.multiple import SIGNIFICANT
from lora_lite_benchmark.rows import REFERENCE

__all__ = ["headline"]

MOST = 0.9
"""The share of the reference's gain over the base that counts as most of it."""


def headline(rows: Sequence[Figures]) -> str:
    """The line, from the figures of a table's rows."""
    base = next((row for row in rows if row["variant"] == "base"), None)
    reference = next((row for row in rows if row["label"] == REFERENCE), None)
    trained = [row for row in rows if row is not base]
    if not trained:
        return "The base alone was tested."
    if base is not None and reference is not None and _gains(base, reference):
        others = [row for row in trained if row is not reference and row["variant"] != "full"]
        gained = [(row, _gain(row, base, reference)) for row in others]
        near = [(row, gain) for row, gain in gained if gain >= MOST]
        if near:
            smallest, gain = min(near, key=lambda found: int(found[0]["parameters"] or 0))
            return _most_of(smallest, gain, reference)
    best = min(trained, key=_badness)
    against = "" if base is None else f"; the base has {_result(base)}"
    return f"{best['label']} is best, with {_result(best)}{against}."


def _most_of(row: Figures, gain: float, reference: Figures) -> str:
    share = int(row["parameters"] or 0) / int(reference["parameters"] or 1)
    much = f"as much as {REFERENCE}" if gain >= 1 else f"{_percent(gain)} of what {REFERENCE} gains"
    return (
        f"{row['label']} gains {much} over the base, with {row['parameters']:,} "
        f"trained numbers, {_percent(share)} of {REFERENCE}'s."
    )


def _gains(base: Figures, reference: Figures) -> bool:
    """Whether the reference is better than the base, and not by chance."""
    metric = "loss" if base[f"{judged_split(base)}_accuracy"] is None else "accuracy"
    p = base[f"{metric}_minus_{REFERENCE}_p"]
    return p is not None and float(p) < SIGNIFICANT and _badness(base) > _badness(reference)


def _gain(row: Figures, base: Figures, reference: Figures) -> float:
    """The gain over the base as a share of the reference's."""
    return (_badness(base) - _badness(row)) / (_badness(base) - _badness(reference))


def _badness(row: Figures) -> float:
    """The share of wrong answers, or the loss of rows that give none."""
    split = judged_split(row)
    accuracy = row[f"{split}_accuracy"]
    return 1 - float(accuracy) if accuracy is not None else float(row[f"{split}_loss"] or 0)


def _result(row: Figures) -> str:
    split = judged_split(row)
    accuracy = row[f"{split}_accuracy"]
    if accuracy is not None:
        return f"{100 * float(accuracy):.1f} % right"
    return f"a loss of {float(row[f'{split}_loss'] or 0):.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
