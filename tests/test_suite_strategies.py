"""What the suite draws: values that a field allows, and values that it does not, from its type and
bounds alone.
"""

import enum
import math
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite.author import TensorSpec, Variant
from lora_lite.fields import validated
from lora_lite.testing.strategies import attempts, field_values, refused_values, varies
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class _Shift(Variant):
    """Δy = e: what a variant must have at least."""

    def tensors(self, site):
        return {"e": TensorSpec((site.d_out,))}

    def init(self, site, derived, statistics, rng):
        return {"e": torch.zeros(site.d_out)}

    def delta_output(self, site, t, x, y):
        return t["e"].expand_as(y)


class Fields(_Shift, name="fields"):
    rank: PositiveInt = 256
    even: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    far: Annotated[int, Field(ge=100, le=1000)] = 500
    whole: int = 0
    alpha: PositiveFloat = 16.0
    own_alpha: PositiveFloat | None = None
    decay: NonNegativeFloat = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    angle: Annotated[float, Field(gt=0, lt=math.pi)] = 0.5
    ratio: float = Field(default=1.0, ge=1)
    unbounded: float = 0.0
    low: Annotated[float, Field(le=-1)] = -1.0
    limit: float = math.inf
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    only: Literal["one"] = "one"
    colour: Colour = Colour.RED
    text: str = "anything"


class Needs(_Shift, name="needs"):
    r: Annotated[int, Field(gt=0)]
    mapping: dict[str, int]


@pytest.mark.parametrize("field", Fields.model_fields)
def test_drawn_values_are_allowed(field: str) -> None:
    @settings(max_examples=40, database=None, derandomize=True)
    @given(field_values(Fields, field))
    def allowed(value: Any) -> None:
        validated(Fields, {field: value})

    allowed()


@pytest.mark.parametrize("field", Fields.model_fields)
def test_refused_values_are_refused(field: str) -> None:
    values = refused_values(Fields, field)
    assert values or field in {"colour", "text"}
    for value in values:
        with pytest.raises(ValueError, match=field):
            validated(Fields, {field: value})


def test_bounds_are_among_the_refused_values() -> None:
    assert {0, -1} <= {v for v in refused_values(Fields, "rank") if isinstance(v, int)}
    assert 3 in refused_values(Fields, "even")
    assert {1.0, 2.0} <= {v for v in refused_values(Fields, "dropout") if isinstance(v, float)}


def test_what_varies() -> None:
    assert [field for field in Fields.model_fields if not varies(Fields, field)] == ["only", "text"]


def test_sizes_fit_small_layers() -> None:
    @settings(max_examples=40, database=None, derandomize=True)
    @given(st.tuples(field_values(Fields, "rank"), field_values(Fields, "even")))
    def small(sizes: tuple[int, int]) -> None:
        assert max(sizes) <= 8

    small()


def test_a_required_field_without_a_strategy_asks_for_one() -> None:
    with pytest.raises(TypeError, match=r"no strategy for needs.mapping.*fields = \{'mapping'"):
        attempts(Needs, {})
    attempts(Needs, {"mapping": st.just({})})
