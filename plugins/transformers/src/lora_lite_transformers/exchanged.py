"""Functions of other libraries that have to be another one for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def exchanged(module: ModuleType, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Let a module have `instead` under this name."""
    original = getattr(module, name)
    setattr(module, name, instead)
    try:
        yield
    finally:
        setattr(module, name, original)
