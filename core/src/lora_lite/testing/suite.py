"""The promises as a pytest class, to be inherited."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis.strategies import SearchStrategy

from lora_lite.author import Variant
from lora_lite.testing.promise import NewPromiseWarning, Promise, Subject
from lora_lite.testing.promises import PROMISES
from lora_lite.testing.sealed import refuse_replaced

TESTS = {f"test_{name}": promise for name, promise in PROMISES.items()}


class VariantTests:
    """Every promise of the contract, one test each: subclass it, and set `variant`.

    Its tests can be neither overridden nor removed; a promise that cannot be kept is declared.

    Attributes:
        variant: an installed variant's name, or a `Variant` class.
        fields: hypothesis strategies for those fields whose type and bounds say too little. Shapes,
            dtypes and layer kinds are not a variant's to choose.
        expected_failures: `{"test_name": "reason"}`. Strict: one that passes is a failure.
    """

    variant: ClassVar[str | type[Variant]] = ""
    fields: ClassVar[Mapping[str, SearchStrategy[Any]]] = {}
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_changes(cls)


def refuse_changes(cls: type[VariantTests]) -> None:
    """Raises a TypeError if a test is replaced, or a failure declared that cannot be.

    Called when a class is made, and again by each of its tests, for the class may have been changed
    since.
    """
    refuse_replaced(cls, VariantTests)
    where = f"{cls.__qualname__}.expected_failures"
    for name, reason in cls.expected_failures.items():
        if name not in TESTS:
            raise TypeError(f"{where}: the suite has no test {name!r}")
        if not TESTS[name].waivable:
            raise TypeError(f"{where}: {name!r} cannot be waived; every adapter must keep it")
        if not isinstance(reason, str) or not reason.strip():
            raise TypeError(f"{where}: {name!r} needs a reason, not {reason!r}")


@dataclass(frozen=True)
class Outcome:
    """How a variant fared with one promise.

    Attributes:
        promise: the promise.
        error: what broke it, or None.
        declared: the reason that is given in expected_failures, or None.
    """

    promise: Promise
    error: Exception | None
    declared: str | None

    @classmethod
    def of(cls, promise: Promise, tests: type[VariantTests]) -> Outcome:
        """Holds the variant of a test class to one promise."""
        declared = tests.expected_failures.get(f"test_{promise.name}")
        subject = Subject.of(tests.variant, tests.fields)
        try:
            promise.run(subject)
        except Exception as error:
            return cls(promise, error, declared)
        return cls(promise, None, declared)

    @property
    def verdict(self) -> Literal["ok", "broken", "declared", "stale", "new"]:
        """How it ended.

        "declared" is broken as declared, "stale" declared broken but kept, and "new" broken, but
        too new a promise to fail for it.
        """
        if self.error is None:
            return "ok" if self.declared is None else "stale"
        if self.declared is not None:
            return "declared"
        return "new" if self.promise.is_new() else "broken"

    def __str__(self) -> str:
        if self.verdict == "new":
            return (
                f"a promise since lora-lite-core {self.promise.since}; the next minor version "
                f"fails here: {self.error}"
            )
        if self.verdict == "stale":
            return (
                f"test_{self.promise.name} passes; take it out of expected_failures "
                f"(there: {self.declared})"
            )
        return self.declared or str(self.error or "")


def _as_test(name: str, promise: Promise) -> Callable[[VariantTests], None]:
    def test(self: VariantTests) -> None:
        refuse_changes(type(self))
        outcome = Outcome.of(promise, type(self))
        if outcome.verdict == "declared":
            pytest.xfail(str(outcome))
        if outcome.verdict == "stale":
            pytest.fail(str(outcome))
        if outcome.verdict == "new":
            warnings.warn(f"{name}: {outcome}", NewPromiseWarning, stacklevel=1)
        if outcome.verdict == "broken" and outcome.error is not None:
            raise outcome.error

    test.__name__ = name
    test.__qualname__ = f"VariantTests.{name}"
    test.__doc__ = promise.text
    return test


for _name, _promise in TESTS.items():
    setattr(VariantTests, _name, _as_test(_name, _promise))
