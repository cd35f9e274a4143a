"""Types for the numbers among a variant's fields.

    class MyVariant(Variant, name="my_variant"):
        alpha: PositiveFinite = 16.0
        dropout: DropoutRate = 0.0
        angle: Annotated[PositiveFinite, Field(lt=math.pi)] = 0.5

A `float` of Python may be infinite, no number at all, or so small or large that float32 holds it
as 0 or as infinity. Each of these would train to nothing without a word, so each is refused here.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

SMALLEST = 1e-6
LARGEST = 1e6


def _in_range(value: float) -> float:
    if value != 0 and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"the size of a number other than 0 is between {SMALLEST} and {LARGEST}")
    return value


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_in_range)]
"""0, or a number whose size is between 1e-6 and 1e6."""

PositiveFinite = Annotated[Finite, Field(gt=0)]
"""A number between 1e-6 and 1e6."""

NonNegativeFinite = Annotated[Finite, Field(ge=0)]
"""0, or a number between 1e-6 and 1e6."""

DropoutRate = Annotated[Finite, Field(ge=0, lt=1)]
"""The probability of dropping an entry, in training mode: 0, or a number from 1e-6 to below 1."""
