"""Test classes to be inherited, whose tests are not the heir's to change."""

from __future__ import annotations


def refuse_replaced(cls: type, suite: type) -> None:
    """Raises a TypeError where a subclass of a suite has another test, or none, in place of the suite's."""
    tests = [name for name in dir(suite) if name.startswith("test_")]
    replaced = [name for name in tests if getattr(cls, name, None) is not getattr(suite, name)]
    if replaced:
        raise TypeError(
            f"{cls.__qualname__} replaces {', '.join(replaced)}: the suite's tests can be neither overridden nor removed"
        )
