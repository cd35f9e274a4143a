"""Progress on long work, told a line at a time."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Tell = Callable[[str], None]

LINES = 10


def told(things: Iterable[T], total: int, tell: Tell | None, what: str = "layers") -> Iterator[T]:
    """The things one by one; at each tenth of them a line says how far it is.

    Args:
        things: to go through.
        total: how many they are, about.
        tell: is given the lines; None tells nothing.
        what: they are.
    """
    for number, thing in enumerate(things, start=1):
        yield thing
        if tell is not None and number * LINES // total > (number - 1) * LINES // total:
            tell(f"{number} of {total} {what}")
