"""The promises as a pytest class, to be inherited."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from hypothesis.strategies import SearchStrategy

from lora_lite.testing.promise import NewPromiseWarning, Promise, Subject
from lora_lite.testing.promises import PROMISES
from lora_lite.variant import Variant

TESTS = {f"test_{name}": promise for name, promise in PROMISES.items()}


class VariantTests:
    """Every promise of the contract, one test each: subclass it as `TestMyVariant`, and set `variant`.

    Attributes:
        variant: an installed variant's name, or a `Variant` class.
        fields: hypothesis strategies for those fields whose type and bounds say too little. Shapes, dtypes and layer kinds
            are not a variant's to choose.
        expected_failures: `{"test_name": "reason"}`. Strict: one that passes is a failure.
    """

    variant: ClassVar[str | type[Variant]] = ""
    fields: ClassVar[Mapping[str, SearchStrategy[Any]]] = {}
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_changes(cls)


def refuse_changes(cls: type[VariantTests]) -> None:
    """Raises a TypeError where a test is replaced, or a failure declared that cannot be. Asked when a class is made, and again
    by each of its tests, for the class may have been changed since.
    """
    replaced = [name for name in TESTS if getattr(cls, name, None) is not getattr(VariantTests, name)]
    if replaced:
        raise TypeError(
            f"{cls.__qualname__} replaces {', '.join(replaced)}: the suite's tests can be neither overridden nor removed. "
            f"A promise that cannot be kept is declared: expected_failures = {{{replaced[0]!r}: 'reason'}}"
        )
    for name, reason in cls.expected_failures.items():
        if name not in TESTS:
            raise TypeError(f"{cls.__qualname__}.expected_failures: the suite has no test {name!r}")
        if not TESTS[name].waivable:
            raise TypeError(f"{cls.__qualname__}.expected_failures: {name!r} cannot be waived; every adapter must keep it")
        if not isinstance(reason, str) or not reason.strip():
            raise TypeError(f"{cls.__qualname__}.expected_failures: {name!r} needs a reason, not {reason!r}")


def _as_test(name: str, promise: Promise) -> Callable[[VariantTests], None]:
    def test(self: VariantTests) -> None:
        refuse_changes(type(self))
        reason = self.expected_failures.get(name)
        subject = Subject.of(self.variant, self.fields)
        try:
            promise.run(subject)
        except Exception as error:
            if reason is not None:
                pytest.xfail(reason)
            if not promise.is_new():
                raise
            warnings.warn(f"{name}, a promise since lora-lite-core {promise.since}: {error}", NewPromiseWarning, stacklevel=1)
            return
        if reason is not None:
            pytest.fail(f"{name} passes; take it out of expected_failures (there: {reason})")

    test.__name__ = name
    test.__qualname__ = f"VariantTests.{name}"
    test.__doc__ = promise.text
    return test


for _name, _promise in TESTS.items():
    setattr(VariantTests, _name, _as_test(_name, _promise))
