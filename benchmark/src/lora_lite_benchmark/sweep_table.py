"""The choices of a sweep as text: one line for each row, and the whole curve below it."""

from collections.abc import Iterable

from lora_lite_benchmark.sweep import Choice, Trial

__all__ = ["sweep_table"]

HEAD = ("row", "trials", "lr", "valid loss", "valid %", "loss at lr/2", "loss at 2 lr", "fields")


def sweep_table(choices: Iterable[Choice]) -> str:
    """A table in Markdown, then the losses by learning rate."""
    chosen = list(choices)
    lines = [_line(HEAD), "|---|" + "---:|" * (len(HEAD) - 2) + "---|"]
    lines += [_line(_cells(choice)) for choice in chosen]
    lines += ["", "The loss is in nats per answer token, on the validation problems."]
    if any(choice.is_at_edge for choice in chosen):
        lines.append("* the best rate is at the edge of the grid: a better one may lie outside.")
    lines += ["", *(_curve(choice) for choice in chosen)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(choice: Choice) -> tuple[str, ...]:
    best = choice.chosen
    varied = {name for trial in choice.trials for name in _differences(trial, choice.trials[0])}
    fields = ", ".join(f"{name}={best.fields[name]}" for name in sorted(varied))
    return (
        choice.row,
        str(len(choice.trials)),
        f"{best.lr:.3g}" + ("*" if choice.is_at_edge else ""),
        f"{best.loss:.4f}",
        f"{100 * best.accuracy:.1f}",
        _loss(choice.loss_at(0.5)),
        _loss(choice.loss_at(2)),
        fields or "–",
    )


def _differences(trial: Trial, other: Trial) -> set[str]:
    return {name for name, value in trial.fields.items() if other.fields.get(name) != value}


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _curve(choice: Choice) -> str:
    ordered = sorted(choice.trials, key=lambda trial: trial.lr)
    points = "  ".join(f"{trial.lr:.3g}: {trial.loss:.4f}" for trial in ordered)
    return f"{choice.row}: {points}"
