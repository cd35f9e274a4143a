"""`lora-lite conform`: the suite without pytest, as a report, promise by promise."""

from __future__ import annotations

import importlib
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from importlib import metadata

from lora_lite.author import Variant
from lora_lite.errors import LoraLiteError
from lora_lite.plugins import provider
from lora_lite.testing.promise import Subject
from lora_lite.testing.promises import PROMISES
from lora_lite.testing.suite import Outcome, VariantTests

INDENT = " " * 10


def conform(name: str, say: Callable[[str], object]) -> str:
    """Hold a variant to every promise, and `say` at once how it fared with each.

    Args:
        name: an installed variant, or `module:Class` of a `Variant`, or of a `VariantTests` with
            its strategies and expected failures. Modules in the working directory are found.
        say: takes a line of the report.

    Returns:
        A summary.

    Raises:
        LoraLiteError: a promise is broken; or there is no such variant or class.
    """
    tests = tests_of(name)
    cls = Subject.of(tests.variant).variant
    package = " ".join(provider(cls)).strip()
    say(f"{cls.name} of {package}, with lora-lite-core {metadata.version('lora-lite-core')}\n")
    broken, started = [], time.perf_counter()
    for promise in PROMISES.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = Outcome.of(promise, tests)
        say(report(outcome))
        if outcome.verdict in ("broken", "stale"):
            broken.append(promise.name)
    duration = f"{time.perf_counter() - started:.0f} s"
    if broken:
        raise LoraLiteError(
            f"{cls.name} breaks {len(broken)} of {len(PROMISES)} promises ({duration}): "
            f"{', '.join(broken)}"
        )
    return f"\n{cls.name} breaks none of {len(PROMISES)} promises ({duration})"


def report(outcome: Outcome) -> str:
    """An outcome as a line, with the reason below it.

    If a promise is broken, also what it says, and the drawn case.
    """
    paragraphs = [str(outcome)]
    word: str = outcome.verdict
    if outcome.verdict == "broken":
        notes = getattr(outcome.error, "__notes__", [])
        failure = f"{type(outcome.error).__name__}: {outcome.error}"
        paragraphs = [failure, *notes, *outcome.promise.text.split("\n\n")]
    if outcome.verdict in ("broken", "stale"):
        word = word.upper()
    lines = [f"{word:<9} {outcome.promise.name}"]
    for paragraph in paragraphs:
        if paragraph.strip():
            lines.append(textwrap.indent(paragraph.strip(), INDENT))
    return "\n".join(lines)


def tests_of(name: str) -> type[VariantTests]:
    """The test class that a name means.

    Raises:
        LoraLiteError: nothing of that name can be tested.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        return _tests(name)
    try:
        sys.path.insert(0, "")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LoraLiteError(
            f"{name!r} cannot be imported: {error}; expected module:Class"
        ) from error
    finally:
        sys.path.remove("")
    if isinstance(found, type) and issubclass(found, VariantTests):
        return found
    if isinstance(found, type) and issubclass(found, Variant) and found.name:
        return _tests(found)
    raise LoraLiteError(
        f"{name!r} is {found!r}; expected a subclass of Variant that has a name, or of VariantTests"
    )


def _tests(variant: str | type[Variant]) -> type[VariantTests]:
    return type("Tests", (VariantTests,), {"variant": variant})
