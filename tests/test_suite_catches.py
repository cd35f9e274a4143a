"""The conformance suite is tested itself: sound variants pass; every mistake in `broken/`, of a
kind that people make, is caught by the test that is meant for it; and the suite cannot be talked
out of a test.
"""

import importlib
import re
import sys
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import strategies as st
from lora_lite.author import Variant
from lora_lite.testing import PROMISES, NewPromiseWarning, Subject, VariantTests
from lora_lite.testing.suite import _as_test

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `broken`, here and in the other process of a promise
PARTS = {
    file.stem: importlib.import_module(f"broken.{file.stem}")
    for file in sorted(HERE.glob("broken/*.py"))
}
BROKEN = PARTS["sound"].BROKEN
RIGHT = PARTS["right"].RIGHT
Sound, Rich = PARTS["sound"].Sound, PARTS["sound"].Rich
CountsOneFactor = PARTS["forward"].CountsOneFactor


class TestSound(VariantTests):
    variant = Sound


class TestRich(VariantTests):
    variant = Rich


@pytest.mark.parametrize(("cls", "promise", "told"), BROKEN, ids=[cls.name for cls, *_ in BROKEN])
def test_each_mistake_is_caught_by_its_test(cls: type[Variant], promise: str, told: str) -> None:
    """A variant with one mistake breaks the promise that is about it, in words that say so."""
    with pytest.raises(Exception, match=told):
        replace(PROMISES[promise], shrink=False).run(Subject.of(cls))


@pytest.mark.parametrize(
    ("cls", "promise"), RIGHT, ids=[f"{cls.name}-{promise}" for cls, promise in RIGHT]
)
def test_a_right_variant_near_a_mistake_passes(cls: type[Variant], promise: str) -> None:
    """A promise is no stricter than it says."""
    PROMISES[promise].run(Subject.of(cls))


def test_state_that_makes_a_failure_come_and_go_is_named() -> None:
    """hypothesis tries a failing case again; if it then passes, the error says why that may be."""
    promise = PROMISES["batch_is_its_rows_and_sequence_its_tokens"]
    told = r"(?s)rows one by one.*state is carried between calls"
    with pytest.raises(AssertionError, match=told):
        promise.run(Subject.of(PARTS["flaky"].FailsOnce))


def test_every_test_has_a_mistake_that_it_catches() -> None:
    assert {promise for _, promise, _ in BROKEN} == PROMISES.keys()


def test_every_promise_says_what_why_and_what_breaks_it() -> None:
    for promise in PROMISES.values():
        paragraphs = promise.text.split("\n\n")
        assert len(paragraphs) == 2, promise.name
        assert "Usually broken" in paragraphs[1].replace("\n", " "), promise.name


def test_the_contract_page_has_every_promise() -> None:
    page = (Path(__file__).parents[1] / "docs/contract.md").read_text().split("## Promises")[1]
    expected = {
        name: " ".join(promise.text.split("\n\n")[0].split()) for name, promise in PROMISES.items()
    }
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)) == expected


def test_a_strategy_of_one_point_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"of sound\.r, only 2 was accepted"):
        PROMISES["fits_most_draws"].run(Subject.of(Sound, {"r": st.just(2)}))


def test_a_strategy_for_a_field_that_is_not_there() -> None:
    with pytest.raises(TypeError, match="has no field rank"):
        PROMISES["fits_most_draws"].run(Subject.of(Sound, {"rank": st.just(2)}))


# --- the suite's own rules


def test_tests_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type(
            "Overrides",
            (VariantTests,),
            {"variant": Sound, "test_base_is_untouched": lambda _: None},
        )


def test_tests_cannot_be_removed() -> None:
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type("Removes", (VariantTests,), {"variant": Sound, "test_macs_are_as_declared": None})


def test_tests_cannot_be_overridden_by_a_second_base() -> None:
    mixin = type("Mixin", (), {"test_macs_are_as_declared": lambda _: None})
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type("Mixed", (mixin, VariantTests), {"variant": Sound})


@pytest.mark.parametrize(
    "name",
    [
        "test_base_is_untouched",
        "test_only_declared_tensors_appear",
        "test_save_and_load_are_bitwise",
    ],
)
def test_what_cannot_be_waived(name: str) -> None:
    with pytest.raises(TypeError, match="cannot be waived"):
        type("Waives", (VariantTests,), {"variant": Sound, "expected_failures": {name: "because"}})


def test_an_expected_failure_names_a_test_and_a_reason() -> None:
    with pytest.raises(TypeError, match="no test 'test_nothing'"):
        type(
            "Unknown",
            (VariantTests,),
            {"variant": Sound, "expected_failures": {"test_nothing": "because"}},
        )
    with pytest.raises(TypeError, match="needs a reason"):
        type(
            "Silent",
            (VariantTests,),
            {"variant": Sound, "expected_failures": {"test_macs_are_as_declared": " "}},
        )


def test_a_change_after_the_class_is_made_is_noticed() -> None:
    """Every other test of the class then fails."""
    tests = type("Changed", (VariantTests,), {"variant": Sound})
    tests.test_macs_are_as_declared = lambda _: None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        tests().test_fields_survive_json()
    tests = type("Waived", (VariantTests,), {"variant": Sound})
    tests.expected_failures = {"test_base_is_untouched": "because"}
    with pytest.raises(TypeError, match="cannot be waived"):
        tests().test_fields_survive_json()


def test_an_expected_failure_is_reported_as_one() -> None:
    reasons = {"test_macs_are_as_declared": "they are counted elsewhere"}
    tests = type(
        "Declared", (VariantTests,), {"variant": CountsOneFactor, "expected_failures": reasons}
    )
    with pytest.raises(pytest.xfail.Exception, match="counted elsewhere"):
        tests().test_macs_are_as_declared()


def test_an_expected_failure_that_passes_fails() -> None:
    reasons = {"test_macs_are_as_declared": "they are counted elsewhere"}
    tests = type("Stale", (VariantTests,), {"variant": Sound, "expected_failures": reasons})
    with pytest.raises(pytest.fail.Exception, match="take it out of expected_failures"):
        tests().test_macs_are_as_declared()


MAJOR, MINOR = (int(number) for number in metadata.version("lora-lite-core").split(".")[:2])


def run_since(
    since: str, variant: type[Variant], expected_failures: dict[str, str] | None = None
) -> None:
    """A test of the suite, as it would be if its promise had come with that version of the core."""
    test = _as_test(
        "test_macs_are_as_declared", replace(PROMISES["macs_are_as_declared"], since=since)
    )
    attributes = {"variant": variant, "expected_failures": expected_failures or {}}
    test(type("Tests", (VariantTests,), attributes)())


def test_a_new_promise_warns_who_breaks_it() -> None:
    with pytest.warns(
        NewPromiseWarning, match=rf"since lora-lite-core {MAJOR}\.{MINOR}; .*: declared .* counted"
    ):
        run_since(f"{MAJOR}.{MINOR}", CountsOneFactor)


def test_a_new_promise_that_is_kept_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_since(f"{MAJOR}.{MINOR}", Sound)


def test_a_promise_of_the_minor_version_before_fails_who_breaks_it() -> None:
    before = f"{MAJOR}.{MINOR - 1}" if MINOR else f"{MAJOR - 1}.9"
    with pytest.raises(AssertionError, match=r"declared .* counted"):
        run_since(before, CountsOneFactor)


def test_a_new_promise_can_be_declared_an_expected_failure() -> None:
    with pytest.raises(pytest.xfail.Exception, match="counted elsewhere"):
        run_since(
            f"{MAJOR}.{MINOR}", CountsOneFactor, {"test_macs_are_as_declared": "counted elsewhere"}
        )


@pytest.mark.parametrize(
    ("since", "core", "new"),
    [
        ("", "0.1.0", False),
        ("0.2", "0.1.9", True),  # not released yet
        ("0.2", "0.2.0.dev1", True),
        ("0.2", "0.2.7", True),
        ("0.2", "0.3.0", False),
        ("0.9", "0.10.0", False),
        ("0.10", "0.10.1", True),
        ("1.4", "2.0", False),
    ],
)
def test_for_how_long_a_promise_is_new(since: str, core: str, new: bool) -> None:
    assert replace(PROMISES["macs_are_as_declared"], since=since).is_new(core) is new
