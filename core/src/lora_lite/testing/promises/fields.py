"""Hyperparameters: what is allowed, what is refused, what survives a file, what has an effect."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import lora_lite as ll
from lora_lite.author import Variant
from lora_lite.fields import validated
from lora_lite.testing.behaviour import behaves_alike, fields_read
from lora_lite.testing.case import Case
from lora_lite.testing.promise import promise, survey
from lora_lite.testing.strategies import Refusal, refused_values, varies

# How many pairs of cases are compared before a field is said to change nothing.
PAIRS = 12
# Values up to this are tolerances: they guard a division, and need not change anything.
TINY = 1e-3


@survey(examples=60, waivable=False)
def fits_most_draws(variant: type[Variant], attempts: Sequence[Case | Refusal]) -> None:
    """Most fields and shapes that the constraints allow are accepted: at least one draw in five,
    and of each field more than one value.

    What is refused is not tested, so a variant that refuses nearly everything would pass every
    other test. Usually broken by constraints that are checked in `tensors()` but not told to
    pydantic (a rank that must be even: `Field(multiple_of=2)`), or by `fields` strategies of one
    point.
    """
    refusals = [attempt for attempt in attempts if isinstance(attempt, Refusal)]
    shown = "".join(
        f"\n  {r.fields} at {r.shape[0]} -> {r.shape[1]}: {r.reason.strip()}" for r in refusals[:5]
    )
    share = len(refusals) / len(attempts)
    assert share <= 0.8, (
        f"{variant.name!r} refuses {len(refusals)} of {len(attempts)} draws; state the constraints "
        f"in the fields' types, or refine the strategies with fields = {{...}}. The first:{shown}"
    )
    cases = [attempt for attempt in attempts if isinstance(attempt, Case)]
    for field in variant.model_fields:
        seen = {repr(getattr(case.variant, field)) for case in cases}
        assert len(seen) > 1 or not varies(variant, field), (
            f"of {variant.name}.{field}, only {', '.join(seen)} was accepted in {len(cases)} "
            "draws; let it vary"
        )


@survey(examples=40)
def every_field_changes_something(
    variant: type[Variant], attempts: Sequence[Case | Refusal]
) -> None:
    """Every field has an effect: another value of it alone gives other tensors, start values,
    outputs, gradients, projections, penalties or costs.

    A hyperparameter that nothing reads is tuned for nothing. Usually broken by a field that was
    left over, by `dropout` that is never called, or by two branches that compute the same. A field
    that only the start values read (a way to decompose) may give the same ones, a field of a
    schedule may act after more steps than are tried, and so may a tolerance of at most 1e-3.
    """
    cases = [attempt for attempt in attempts if isinstance(attempt, Case)]
    for field in variant.model_fields:
        pairs = list(_pairs(cases, field))[:PAIRS] if varies(variant, field) else []
        if not pairs or not all(behaves_alike(one, other) for one, other in pairs):
            continue
        start: set[str] = set().union(*(fields_read(case, "start") for case, _ in pairs))
        forward: set[str] = set().union(*(fields_read(case, "forward") for case, _ in pairs))
        values = [getattr(case.variant, field) for pair in pairs for case in pair]
        numbers = [value for value in values if type(value) in (int, float)]
        schedule: set[str] = set().union(*(fields_read(case, "schedule") for case, _ in pairs))
        if field in (start | schedule) - forward:
            continue
        if field in forward and all(type(value) is int for value in values):
            continue  # the size of a chunk, say
        if field in forward and numbers and max(map(abs, numbers)) <= TINY:
            continue
        tried = ", ".join(dict.fromkeys(map(repr, values)))
        raise AssertionError(
            f"the field {field!r} changes nothing: {tried} give the same tensors, outputs, "
            f"gradients and costs in {len(pairs)} pairs of cases"
        )


@promise(examples=20)
def fields_survive_json(case: Case) -> None:
    """A variant written as JSON and read again is equal to itself, and so is one that is pickled.

    An adapter file holds the fields as JSON. Usually broken by a field whose type JSON does not
    have (a torch.dtype, a set, a tuple that comes back as a list, an arbitrary object), or by a
    validator that changes a value each time it runs.
    """
    variant, cls = case.variant, type(case.variant)
    text = variant.model_dump_json()
    again = cls.model_validate_json(text)
    assert again == variant, f"{variant} became {again}, by way of {text}"
    assert hash(again) == hash(variant), f"{variant}: its hash changed by way of {text}"
    unpickled = pickle.loads(pickle.dumps(variant))
    assert unpickled == variant, f"{variant} became {unpickled} by pickling"
    for field in cls.model_fields:
        try:
            infinite = cls(**{**dict(variant), field: math.inf})
        except ValueError:
            continue
        text = infinite.model_dump_json()
        assert cls.model_validate_json(text) == infinite, (
            f"{field}=inf is allowed and does not survive JSON: {text}"
        )


@promise(examples=1)
def bad_fields_are_refused(case: Case) -> None:
    """A field that does not exist, or a value outside its type and bounds, is a `FieldError` that
    names variant and field.

    A hyperparameter that is silently ignored or converted costs someone a training run. Usually
    broken by a wider `model_config` (extra="allow", strict=False), or by a field typed `Any`.
    """
    cls = type(case.variant)
    given = dict(case.variant)
    bad = [(field, value) for field in cls.model_fields for value in refused_values(cls, field)]
    for field, value in [*bad, ("no_such_field", 1)]:
        told = _refusal(cls, {**given, field: value})
        assert told is not None, f"{field}={value!r} was accepted"
        assert field in told, f"{field}={value!r}: the error does not name the field: {told}"
        assert cls.name in told, f"{field}={value!r}: the error does not name the variant: {told}"


def _refusal(cls: type[Variant], fields: dict[str, Any]) -> str | None:
    try:
        validated(cls, fields)
    except ll.FieldError as error:
        return str(error)
    return None


def _pairs(cases: Sequence[Case], field: str) -> Iterator[tuple[Case, Case]]:
    """Cases that differ in one field alone: each with the values that it has elsewhere."""
    values = [getattr(case.variant, field) for case in cases]
    for case in cases:
        mine = getattr(case.variant, field)
        others = (case.with_fields(**{field: value}) for value in values if value != mine)
        other = next(filter(None, others), None)
        if other is not None:
            yield case, other
