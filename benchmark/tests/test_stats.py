"""Standard errors and paired intervals: their symmetries, and that they cover what they claim to
cover.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_benchmark.multiple import SIGNIFICANT, adjusted_p
from lora_lite_benchmark.stats import Scores, compare, difference, estimate

sizes = st.tuples(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**16))


def scores(seeds: int, questions: int, seed: int, shift: float = 0.0) -> Scores:
    """A row of random outcomes; the questions' token counts depend on their number alone."""
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(questions).integers(1, 60, questions).astype(float)
    correct = (rng.random((seeds, questions)) < 0.5).astype(float)
    nats = tokens * (1 + shift + 0.3 * rng.random((seeds, questions)))
    return Scores(tuple(range(seeds)), correct, nats, tokens)


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_a_row_is_never_separable_from_itself(size: tuple[int, int, int]) -> None:
    compared = compare(scores(*size), scores(*size))
    assert compared is not None
    for side in (compared.accuracy, compared.loss):
        assert side == (0, 0, 0)
        assert not side.separable


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_swapping_the_rows_mirrors_the_interval(size: tuple[int, int, int]) -> None:
    seeds, questions, seed = size
    one, two = scores(seeds, questions, seed), scores(seeds, questions, seed + 1, shift=0.2)
    there, back = compare(one, two), compare(two, one)
    assert there is not None
    assert back is not None
    for a, b in zip((there.accuracy, there.loss), (back.accuracy, back.loss), strict=True):
        np.testing.assert_allclose([a.value, a.low, a.high], [-b.value, -b.high, -b.low], atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_the_same_rows_give_the_same_interval(size: tuple[int, int, int]) -> None:
    seeds, questions, seed = size
    pair = scores(seeds, questions, seed), scores(seeds, questions, seed + 7)
    assert compare(*pair) == compare(*pair)


def test_one_seeds_accuracy_has_the_binomial_error() -> None:
    row = scores(1, 400, 3)
    p = row.correct.mean()
    assert row.accuracy.value == pytest.approx(p)
    assert row.accuracy.error == pytest.approx(np.sqrt(p * (1 - p) / 400))


def test_rows_without_a_seed_in_common_are_not_compared() -> None:
    one, two = scores(1, 5, 0), scores(1, 5, 1)
    assert compare(one, Scores((9,), two.correct, two.nats, two.tokens)) is None


def test_the_base_is_compared_with_every_seed() -> None:
    base = scores(1, 30, 0)
    compared = compare(scores(3, 30, 1), Scores(None, base.correct, base.nats, base.tokens))
    assert compared is not None
    assert compared.seeds == (0, 1, 2)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_covers_the_true_difference(seeds: int) -> None:
    """About 95 % of 200 simulated comparisons; questions differ in difficulty, seeds in luck (with
    one seed there is none).
    """
    rng, covered = np.random.default_rng(0), 0
    luck = 0.03 if seeds > 1 else 0.0
    for _ in range(200):
        values = 0.1 + 0.5 * rng.standard_normal(150) + 0.3 * rng.standard_normal((seeds, 150))
        found = difference(values + luck * rng.standard_normal((seeds, 1)), np.ones(150))
        covered += found.low <= 0.1 <= found.high
    assert 0.90 * 200 <= covered <= 0.99 * 200 + 2


def test_more_seeds_than_questions_can_explain_widen_the_error() -> None:
    """Two seeds that differ everywhere are less certain than two that agree."""
    rng = np.random.default_rng(1)
    values = rng.random((2, 100))
    apart = np.stack([values[0], values[0] + 1])
    alike = np.stack([values[0] + 0.5, values[0] + 0.5])
    assert estimate(apart, np.ones(100)).value == pytest.approx(estimate(alike, np.ones(100)).value)
    assert estimate(apart, np.ones(100)).error > 5 * estimate(alike, np.ones(100)).error


def test_a_family_of_equals_rarely_has_a_difference() -> None:
    """Of 200 families of 12 differences that are all chance and share their questions' difficulty,
    about 5 % have one that seems real after the correction; without it, it is far more.
    """
    rng = np.random.default_rng(0)
    corrected = uncorrected = 0
    for _ in range(200):
        shared = rng.standard_normal((1, 1, 80))
        family = list(0.5 * shared + rng.standard_normal((12, 1, 80)))
        corrected += min(adjusted_p(family, np.ones(80))) < SIGNIFICANT
        uncorrected += any(difference(values, np.ones(80)).separable for values in family)
    assert 0.01 * 200 <= corrected <= 0.10 * 200
    assert uncorrected > 0.25 * 200


@settings(deadline=None, max_examples=25)
@given(sizes, st.integers(2, 6))
def test_corrected_p_do_not_depend_on_the_order_and_grow_with_the_family(
    size: tuple[int, int, int], members: int
) -> None:
    """With one seed (the moves of seeds are drawn for each place): a larger difference has no
    larger p, a family that is larger gives no smaller one, and no difference at all has p = 1.
    """
    _seeds, questions, seed = size
    rng = np.random.default_rng(seed)
    weights = np.ones(questions)
    family = [rng.standard_normal((1, questions)) + number / 4 for number in range(members)]
    family.append(np.zeros((1, questions)))
    p = adjusted_p(family, weights)
    assert p[-1] == 1
    np.testing.assert_allclose(adjusted_p(family[::-1], weights), p[::-1])
    for alone, together in zip(family, p, strict=True):
        assert adjusted_p([alone], weights)[0] <= together
