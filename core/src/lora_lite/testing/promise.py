"""A promise: a function that holds a variant to one sentence of the contract.

Its docstring says what is promised, why, and what usually breaks it. `PROMISES` has them all, in
the order of the pages of `lora_lite.testing.promises`.

A promise that is added after a release says with `since` which minor version of the core brought
it. Throughout that version it only warns those who break it, with a `NewPromiseWarning`; from the
next one on it fails them.

Two environment variables say how much is tried: LORA_LITE_EXAMPLES multiplies the number of drawn
cases, and LORA_LITE_SEED draws others (0 by default: every run draws the same).
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import hypothesis
import torch
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.strategies import SearchStrategy

from lora_lite.author import Variant
from lora_lite.plugins import variant_class
from lora_lite.testing.case import Case
from lora_lite.testing.compare import NoEffectError
from lora_lite.testing.strategies import Refusal, attempts

Check = Callable[[Case], None]
Survey = Callable[[type[Variant], Sequence[Case | Refusal]], None]

PROMISES: dict[str, Promise] = {}


class NewPromiseWarning(UserWarning):
    """A variant breaks a promise that is new in this minor version of the core.

    From the next minor version on, its test fails.
    """


@dataclass(frozen=True)
class Subject:
    """What is tested: a variant class, and strategies for some of its fields.

    A field needs a strategy if its type and bounds say too little.
    """

    variant: type[Variant]
    fields: Mapping[str, SearchStrategy[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, variant: str | type[Variant], fields: Mapping[str, SearchStrategy[Any]] | None = None
    ) -> Subject:
        """From a name or a class."""
        found = variant_class(variant) if isinstance(variant, str) else variant
        if not (isinstance(found, type) and issubclass(found, Variant)) or not found.name:
            raise TypeError(
                f"variant = {variant!r}: expected the name of an installed variant, or a subclass "
                "of Variant that has a name"
            )
        return cls(found, fields or {})

    def attempts(self) -> SearchStrategy[Case | Refusal]:
        """What hypothesis draws."""
        return attempts(self.variant, self.fields)


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        name: `start_matches_identity`; as a test, `test_start_matches_identity`.
        text: what is promised, why, and what usually breaks it.
        examples: how many cases are drawn.
        check: takes one case; or `survey` takes all attempts at once, refusals included.
        sizes: whether the first and the last drawn case are also checked on a large layer, and on
            one whose sizes are odd.
        shrink: whether a failing case is made smaller before it is shown (not where one is slow).
        waivable: whether it may be declared an expected failure.
        since: the minor version of the core, such as "0.2", that brought it; empty for the first
            promises.
    """

    name: str
    text: str
    examples: int
    check: Check | None = None
    survey: Survey | None = None
    sizes: bool = False
    shrink: bool = True
    waivable: bool = True
    since: str = ""

    def is_new(self, core: str | None = None) -> bool:
        """Whether it only warns, with this version of the core (by default, the installed one)."""
        if not self.since:
            return False
        return _minor(core or metadata.version("lora-lite-core")) <= _minor(self.since)

    def run(self, subject: Subject) -> None:
        """Raises whatever breaks the promise, an AssertionError as a rule."""
        with _one_thread():
            if self.survey is not None:
                drawn: list[Case | Refusal] = []
                self._draw(subject, drawn.append)
                with torch.random.fork_rng(devices=[]):
                    self.survey(subject.variant, drawn)
            else:
                cases: list[Case] = []
                self._draw(subject, lambda attempt: self._take(attempt, cases))
                for case in _other_sizes(cases, subject) if self.sizes else ():
                    self._hold_and_name(case)

    def _take(self, attempt: Case | Refusal, cases: list[Case]) -> None:
        if isinstance(attempt, Refusal):
            hypothesis.reject()
        self._hold(attempt)
        cases.append(attempt)

    def _hold(self, case: Case) -> None:
        """Check a case; if something has no effect there, one with more room decides."""
        assert self.check is not None
        with torch.random.fork_rng(devices=[]):
            try:
                self.check(case)
            except NoEffectError:
                roomier = case.roomier()
                if roomier is None:
                    raise
                try:
                    self.check(roomier)
                except NoEffectError:
                    pass
                else:
                    return
                raise

    def _hold_and_name(self, case: Case) -> None:
        try:
            self._hold(case)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in the {case}")
            raise

    def _draw(self, subject: Subject, take: Callable[[Case | Refusal], None]) -> None:
        phases = [hypothesis.Phase.generate]
        if self.shrink:
            phases.append(hypothesis.Phase.shrink)

        @hypothesis.seed(self._seed())
        @hypothesis.settings(
            max_examples=self.examples * int(os.environ.get("LORA_LITE_EXAMPLES", "1")),
            phases=phases,
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(subject.attempts())
        def example(attempt: Case | Refusal) -> None:
            take(attempt)

        try:
            example()
        except Unsatisfiable:
            raise AssertionError(
                f"variant {subject.variant.name!r} refused every draw, so nothing was tested; "
                "see test_fits_most_draws for its reasons"
            ) from None
        except Flaky as error:
            raise _state_is_carried(error) from error

    def _seed(self) -> int:
        text = f"{os.environ.get('LORA_LITE_SEED', '0')}/{self.name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def promise(examples: int, **options: Any) -> Callable[[Check], Check]:
    """Registers a function of one case as a promise under its own name.

    The options are attributes of `Promise`.
    """

    def register(check: Check) -> Check:
        _add(Promise(check.__name__, _text(check), examples, check=check, **options))
        return check

    return register


def survey(examples: int, **options: Any) -> Callable[[Survey], Survey]:
    """Registers a function of the class and all that was drawn for it."""

    def register(check: Survey) -> Survey:
        _add(Promise(check.__name__, _text(check), examples, survey=check, **options))
        return check

    return register


def _add(new: Promise) -> None:
    assert new.name not in PROMISES, new.name
    PROMISES[new.name] = new


def _other_sizes(cases: list[Case], subject: Subject) -> Iterator[Case]:
    """The first and the last case in other sizes. Refined fields keep their values."""
    for case in dict.fromkeys([*cases[:1], *cases[-1:]]):
        for other in (case.larger(keep=subject.fields), case.odd(keep=subject.fields)):
            if other is not None:
                yield other


def _state_is_carried(error: Flaky) -> AssertionError:
    """The failure that hypothesis saw only once, as an error that says what that means."""
    seen = [inner for inner in getattr(error, "exceptions", ()) if isinstance(inner, Exception)]
    first = seen[0] if seen else error
    carried = AssertionError(
        f"{type(first).__name__}: {first}\n"
        "The same case passed when it was tried again: state is carried between calls, on the "
        "variant, its class or its module"
    )
    for note in getattr(first, "__notes__", ()):
        carried.add_note(note)  # type: ignore[attr-defined]
    return carried


def _text(check: Callable[..., None]) -> str:
    return inspect.cleandoc(check.__doc__ or "")


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
