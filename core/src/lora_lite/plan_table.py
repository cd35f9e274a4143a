"""A `Plan` as text: one row for each layer, then the total, then what is out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lite.placements import Placement, Plan

Row = tuple[str, str, str, str, str]
HEAD: Row = ("layer", "d_in -> d_out", "parameters", "MACs/token", "MACs/forward")


def plan_table(plan: Plan) -> str:
    """The table that `print(plan)` shows."""
    rows = list(_rows(plan))
    width = max(len(name) for name, *_ in rows)
    lines = [str(plan.recipe)]
    for name, sizes, parameters, per_token, per_forward in rows:
        numbers = f"{parameters:>14}  {per_token:>14}  {per_forward:>16}"
        lines.append(f"{name:<{width}}  {sizes:>14}  {numbers}")
    for sentence in plan.unreachable:
        lines.append(f"out of reach: {sentence}")
    return "\n".join(lines)


def _rows(plan: Plan) -> Iterator[Row]:
    yield HEAD
    for placement in plan.placements:
        sizes = f"{placement.layer.d_in} -> {placement.layer.d_out}"
        yield (placement.path, sizes, *_costs(placement))
    if plan.shared_parameters:
        yield ("shared", "", f"{plan.shared_parameters:,}", "", "")
    yield ("total", f"{len(plan.placements)} layers", *_costs(plan))


def _costs(costly: Plan | Placement) -> tuple[str, str, str]:
    """Its parameters and multiply-accumulates, with thousands separated."""
    return (f"{costly.parameters:,}", f"{costly.macs_per_token:,}", f"{costly.macs_per_forward:,}")
