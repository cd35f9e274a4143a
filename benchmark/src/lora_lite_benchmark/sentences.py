"""One sentence for each row, which says what was found as a paper would quote it."""

from collections.abc import Sequence

from lora_lite_benchmark.figures import Figures, judged_split
from lora_lite_benchmark.multiple import SIGNIFICANT
from lora_lite_benchmark.rows import REFERENCE

__all__ = ["sentences"]


def sentences(rows: Sequence[Figures]) -> list[str]:
    """The sentences of the rows of one table, in their order."""
    compared = sum(row[f"loss_minus_{REFERENCE}"] is not None for row in rows)
    return [_sentence(row, compared) for row in rows]


def _sentence(row: Figures, compared: int) -> str:
    subject = "The base" if row["variant"] == "base" else f"{row['label']}{_size(row)}"
    parts = [f"{subject} {_result(row)}", _difference(row, compared), _cost(row)]
    return ", ".join(part for part in parts if part) + "."


def _size(row: Figures) -> str:
    seeds = str(row["seeds"]).split()
    count = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f" ({row['parameters']:,} parameters, lr {row['lr']:g}{count})"


def _result(row: Figures) -> str:
    """The accuracy, or the loss of rows that give no answers."""
    split = judged_split(row)
    accuracy, error = row[f"{split}_accuracy"], row[f"{split}_accuracy_error"]
    if accuracy is None or error is None:
        loss = float(row[f"{split}_loss"] or 0)
        return f"has a {split} loss of {loss:.4f} nats per answer token"
    shares = f"{100 * float(accuracy):.1f} % ± {100 * float(error):.1f}"
    return f"solves {shares} of the {split} problems"


def _difference(row: Figures, compared: int) -> str:
    """How it compares with the reference: in points of accuracy, or in nats."""
    in_points = row[f"accuracy_minus_{REFERENCE}"] is not None
    name = f"{'accuracy' if in_points else 'loss'}_minus_{REFERENCE}"
    figures = [row[f"{name}{end}"] for end in ("", "_low", "_high", "_p")]
    if None in figures:
        return ""
    value, low, high, p = (float(figure or 0) for figure in figures)
    factor, unit, digits = (100, "points", 1) if in_points else (1, "nats", 4)
    apart = f"{abs(factor * value):.{digits}f} {unit} {'less' if value < 0 else 'more'}"
    interval = f"{factor * low:+.{digits}f} to {factor * high:+.{digits}f}"
    among = f" among {compared} comparisons" if compared > 1 else ""
    verdict = "" if p < SIGNIFICANT else ", so it may be chance"
    return f"{apart} than {REFERENCE} (95 % interval {interval}; p {_p(p)}{among}{verdict})"


def _cost(row: Figures) -> str:
    if row["step_ratio"] is None:
        return ""
    return (
        f"at {float(row['step_ratio']):.2f} times the base's step and "
        f"{float(row['inference_ratio'] or 0):.2f} times its forward"
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
