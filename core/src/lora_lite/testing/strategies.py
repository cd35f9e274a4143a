"""What hypothesis draws: a variant's fields, from their constraints, and the layer it is put on."""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic.fields import FieldInfo

import lora_lite as ll
from lora_lite.author import Variant
from lora_lite.fields import validated
from lora_lite.testing.case import KINDS, Case

# Small layers: tall, wide and square ones; an odd width among them, the others with many divisors.
WIDTHS = (4, 5, 8, 12, 16, 24)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Sizes (ranks, block sizes, counts) that small layers have room for.
SIZES = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Refusal:
    """A draw that the variant refused, and its words for that."""

    fields: Mapping[str, Any]
    shape: tuple[int, int]
    reason: str


def attempts(
    variant: type[Variant], refined: Mapping[str, SearchStrategy[Any]]
) -> SearchStrategy[Case | Refusal]:
    """Cases for a variant, and refusals where it takes other fields, or does not fit the shape.

    Args:
        variant: the class.
        refined: strategies for some of its fields, in place of those that follow from their types.
    """
    unknown = refined.keys() - variant.model_fields.keys()
    if unknown:
        raise TypeError(
            f"fields: variant {variant.name!r} has no field {', '.join(sorted(unknown))}"
        )
    fields = {
        name: refined[name] if name in refined else field_values(variant, name)
        for name in variant.model_fields
    }

    @st.composite
    def attempt(draw: DrawFn) -> Case | Refusal:
        values = {name: draw(strategy, label=name) for name, strategy in fields.items()}
        d_in, d_out = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
        kind, bias = draw(st.sampled_from(KINDS)), draw(st.booleans())
        dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))
        bias = bias or kind == "Conv1D"
        try:
            case = Case(validated(variant, values), kind, d_in, d_out, bias, dtype, seed)
            case.plan()
        except (ll.FieldError, ll.MisfitError) as error:
            return Refusal(values, (d_in, d_out), str(error))
        return case

    return attempt()


def field_values(variant: type[Variant], field: str) -> SearchStrategy[Any]:
    """Values of one field, from its type and bounds.

    Ordinary ones, the default if that is no size, and the ends that are allowed.
    """
    info = variant.model_fields[field]
    strategy = _values(info.annotation, info.metadata, info.get_default(call_default_factory=True))
    if strategy is not None:
        return strategy
    if info.is_required():
        raise TypeError(
            f"no strategy for {variant.name}.{field}: {info.annotation}; "
            f"give one in fields = {{{field!r}: st.sampled_from(...)}}"
        )
    return st.just(info.get_default(call_default_factory=True))


def varies(variant: type[Variant], field: str) -> bool:
    """Whether a field's type and bounds allow more than one value that `field_values` knows of."""
    info = variant.model_fields[field]
    kinds = _types(info.annotation)
    if kinds == [int]:
        return len(_sizes(_Bounds.of(info.annotation, info.metadata))) > 1
    if len(kinds) > 1 or kinds[0] in (float, bool):
        return True
    if get_origin(kinds[0]) is Literal:
        return len(get_args(kinds[0])) > 1
    return _is_enum(kinds[0]) and len(list(kinds[0])) > 1


def refused_values(variant: type[Variant], field: str) -> list[Any]:
    """Values that a field's type and bounds do not allow."""
    info = variant.model_fields[field]
    kinds = set(_types(info.annotation))
    if not kinds <= {int, float, bool, type(None)} and not any(
        get_origin(kind) is Literal for kind in kinds
    ):
        return []
    values: list[Any] = ["no such value", [1]]
    values += [None] if type(None) not in kinds else []
    values += [True] if kinds == {int} or kinds == {float} else []
    if kinds == {int} or kinds == {float}:
        values += _Bounds.of(info.annotation, info.metadata).outside(whole=int in kinds)
    return values


@dataclass(frozen=True)
class _Bounds:
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    multiple: int = 1

    @classmethod
    def of(cls, annotation: Any, metadata: Iterable[Any]) -> _Bounds:
        """From the marks that pydantic leaves: objects with gt, ge, lt, le or multiple_of."""
        marks = {}
        for mark in [*_marks(annotation), *metadata]:
            for name in ("gt", "ge", "lt", "le", "multiple_of"):
                if getattr(mark, name, None) is not None:
                    marks[name] = getattr(mark, name)
        return cls(
            low=marks.get("gt", marks.get("ge", -math.inf)),
            high=marks.get("lt", marks.get("le", math.inf)),
            low_open="gt" in marks,
            high_open="lt" in marks,
            multiple=marks.get("multiple_of", 1),
        )

    def allows(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and (self.multiple == 1 or value % self.multiple == 0)

    def outside(self, whole: bool) -> list[Any]:
        convert = int if whole else float
        values = [
            convert(end)
            for end, is_open in ((self.low, self.low_open), (self.high, self.high_open))
            if is_open
        ]
        values += [convert(self.low - 1)] if self.low > -math.inf else []
        values += [convert(self.high + 1)] if self.high < math.inf else []
        return values + ([self.multiple + 1] if self.multiple > 1 else [])


def _values(annotation: Any, metadata: Iterable[Any], default: Any) -> SearchStrategy[Any] | None:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        return _values(inner, [*_flat(marks), *metadata], default)
    if origin in (Union, types.UnionType):
        parts = [
            part
            for kind in get_args(annotation)
            if (part := _values(kind, metadata, default)) is not None
        ]
        return st.one_of(parts) if parts else None
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    bounds = _Bounds.of(annotation, metadata)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.sampled_from(_sizes(bounds))
    if annotation is float:
        return _floats(bounds, default)
    if _is_enum(annotation):
        return st.sampled_from(list(annotation))
    return None


def _sizes(bounds: _Bounds) -> list[int]:
    sizes = sorted({size * bounds.multiple for size in SIZES})
    within = [size for size in sizes if size <= SIZES[-1] and bounds.allows(size)]
    if within:
        return within
    lowest = math.ceil(bounds.low) if bounds.low > -math.inf else math.floor(bounds.high)
    near = [value for value in range(lowest - 16, lowest + 17) if bounds.allows(value)]
    return near[:2] if bounds.low > -math.inf else near[-2:]


def _floats(bounds: _Bounds, default: Any) -> SearchStrategy[float]:
    centre = (
        default
        if isinstance(default, float) and math.isfinite(default) and bounds.allows(default)
        else None
    )
    low, high = bounds.low, bounds.high
    if low > -math.inf and high < math.inf:
        margin = (high - low) / 10
        inner = st.floats(low + margin, high - margin)
    elif low > -math.inf:
        reach = centre - low if centre is not None and centre > low else 1.0
        inner = st.floats(low + reach / 4, low + 4 * reach)
    elif high < math.inf:
        inner = st.floats(high - 4, high - 0.25)
    else:
        inner = st.floats(-2, 2)
    ends = [float(end) for end in (low, high) if math.isfinite(end) and bounds.allows(end)]
    known = [*ends, *([default] if isinstance(default, float) and bounds.allows(default) else [])]
    return st.one_of(st.sampled_from(known), inner) if known else inner


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _types(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _types(part)]
    return [annotation]


def _marks(annotation: Any) -> list[Any]:
    return _flat(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else []


def _flat(marks: Iterable[Any]) -> list[Any]:
    """A `Field(...)` inside Annotated holds its marks in a list of its own."""
    return [
        inner
        for mark in marks
        for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])
    ]
