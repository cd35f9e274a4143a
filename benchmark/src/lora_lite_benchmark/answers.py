"""The final number of an answer, and whether two answers agree.

The final number of a text is, by the first rule that finds one:

1. the number after `####`, as in GSM8K,
2. the number after `The answer is`, as in MetaMathQA,
3. the last number of the text.

Of several markers the first counts, because a base model that has answered often goes on with
another question. Numbers are compared as decimals, so `18`, `$18.00` and `18.` agree.
"""

import re
from decimal import Decimal

__all__ = ["final_number", "is_correct"]

NUMBER = re.compile(
    r"""
    # A sign, unless it is an operator, as the minus of 5-3, 5%-3 or (4)-3 is.
    (?:(?<![\w.)\]%])(?P<before>[-−+]))?
    [$€£¥]?
    (?P<after>(?<=[$€£¥])[-−+])?              # $-5 as well as -$5
    (?P<digits>
        [0-9]{1,3}(?:,[0-9]{3})+(?![0-9])     # 1,234,567: commas only between groups of three
      | [0-9]+
      | (?<![0-9])(?=\.[0-9])                 # .5
    )
    (?P<fraction>\.[0-9]+)?
    """,
    re.VERBOSE,
)
GSM8K_MARKER = re.compile(r"####([^\n]*)")
METAMATH_MARKER = re.compile(r"the answer is:?([^\n]*)", re.IGNORECASE)


def final_number(text: str) -> Decimal | None:
    """The number that `text` gives as its answer; None if it holds no number.

    Fractions and exponents are not read.
    """
    for marker in (GSM8K_MARKER, METAMATH_MARKER):
        if (found := marker.search(text)) and (numbers := _numbers(found[1])):
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def is_correct(generated: str, reference: str) -> bool:
    """Whether both texts have the same final number. Never, if `reference` has none."""
    expected = final_number(reference)
    return expected is not None and final_number(generated) == expected


def _numbers(text: str) -> list[Decimal]:
    return [_decimal(match) for match in NUMBER.finditer(text)]


def _decimal(match: re.Match[str]) -> Decimal:
    value = Decimal((match["digits"].replace(",", "") or "0") + (match["fraction"] or ""))
    negative = (match["before"] or match["after"] or "+") in "-−"
    return -value if negative else value
