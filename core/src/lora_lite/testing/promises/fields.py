"""Hyperparameters: what is allowed, what is refused, what survives a file."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import lora_lite as ll
from lora_lite.fields import validated
from lora_lite.testing.case import Case
from lora_lite.testing.promise import promise, survey
from lora_lite.testing.strategies import Refusal, refused_values, varies
from lora_lite.variant import Variant


@survey(examples=60, waivable=False)
def fits_most_draws(variant: type[Variant], attempts: Sequence[Case | Refusal]) -> None:
    """Most fields and shapes that the constraints allow are taken: at least one draw in five, and of each field more than one
    value.

    What is refused is not tested, so a variant that refuses nearly everything would pass every other test. Usually broken by
    constraints that are checked in `tests()` but not told to pydantic (a rank that must be even: `Field(multiple_of=2)`), or
    by `fields` strategies of one point.
    """
    refusals = [attempt for attempt in attempts if isinstance(attempt, Refusal)]
    shown = "".join(
        f"\n  {r.fields} at {r.shape[0]} -> {r.shape[1]}: {r.reason.strip()}" for r in refusals[:5]
    )
    share = len(refusals) / len(attempts)
    assert share <= 0.8, (
        f"{variant.name!r} refuses {len(refusals)} of {len(attempts)} draws; state the constraints in the fields' types, or "
        f"refine the strategies with fields = {{...}}. The first of them:{shown}"
    )
    cases = [attempt for attempt in attempts if isinstance(attempt, Case)]
    for field in variant.model_fields:
        seen = {repr(getattr(case.variant, field)) for case in cases}
        assert len(seen) > 1 or not varies(variant, field), (
            f"of {variant.name}.{field}, only {', '.join(seen)} was taken in {len(cases)} draws; let it vary"
        )


@promise(examples=20)
def fields_survive_json(case: Case) -> None:
    """A variant written as JSON and read again is equal to itself, and so is one that is pickled.

    An adapter file holds the fields as JSON. Usually broken by a field whose type JSON does not have (a torch.dtype, a set, a
    tuple that comes back as a list, an arbitrary object), or by a validator that changes a value each time it runs.
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
    """A field that does not exist, or a value outside its type and bounds, is a `FieldError` that names variant and field.

    A hyperparameter that is silently ignored or converted costs someone a training run. Usually broken by a wider
    `model_config` (extra="allow", strict=False), or by a field typed `Any`.
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
