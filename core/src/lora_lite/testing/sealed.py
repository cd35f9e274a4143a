"""Test classes that are inherited, and whose tests a subclass cannot change."""

from __future__ import annotations


def refuse_replaced(cls: type, suite: type) -> None:
    """Raises a TypeError if a subclass of a suite replaces or removes one of the suite's tests."""
    tests = [name for name in dir(suite) if name.startswith("test_")]
    replaced = [name for name in tests if getattr(cls, name, None) is not getattr(suite, name)]
    if replaced:
        raise TypeError(
            f"{cls.__qualname__} replaces {', '.join(replaced)}: the suite's tests can be neither "
            "overridden nor removed"
        )
