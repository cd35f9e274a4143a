"""How sure a figure is: standard errors, and intervals of differences between rows.

Accuracy and loss are one thing here, a ratio of sums over questions: right answers over questions,
or nats over answer tokens. A row has such values for each seed and question, x of shape
(seeds, questions). Its figure is

    R = meanₛ (Σᵢ xₛᵢ / Σᵢ wᵢ),    w = 1 for accuracy, w = tokens for the loss.

Two things vary. **Questions**: another test set would give another figure. The questions are the
same for all seeds, and for both sides of a difference. **Seeds**: another seed would have trained
another adapter. With deviations linearised, zₛᵢ = R + (xₛᵢ - R wᵢ) / mean(w), the variance of R is
estimated as

    var(R) = varᵢ(meanₛ z) / n + τ² / S,    τ² = max(0, varₛ(meanᵢ z) - varₛᵢ(residual) / n),

where τ² is what the figures of the seeds vary beyond what chance outcomes of single questions
explain.

The interval of a difference is a paired bootstrap. Each resample draws n questions with
replacement, the same for both rows and for all seeds, and takes the ratio of sums again. With
several seeds it also moves by τ / √S times a draw of Student's t with S - 1 degrees of freedom.
Seeds are not resampled, because three are too few for that: where they vary most, such an interval
covers 77 % instead of 95 %. The 2.5th and 97.5th percentiles are the interval. Resampling questions
and seeds by pigeonholes is from Owen, arXiv:0712.1111.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_lite_benchmark.results import Outcome

__all__ = [
    "Comparison",
    "Difference",
    "Estimate",
    "Paired",
    "Scores",
    "compare",
    "comparison_of",
    "difference",
    "estimate",
    "paired",
    "resampled",
    "scores_of",
]

RESAMPLES = 10_000
CONFIDENCE = 0.95

Array = NDArray[Any]


class Estimate(NamedTuple):
    """A figure with one standard error."""

    value: float
    error: float


class Difference(NamedTuple):
    """`value` with its 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float

    @property
    def separable(self) -> bool:
        """Whether the interval excludes 0. It never does for two rows with the same outcomes.

        Of many comparisons some are separable by chance; see `multiple.py`.
        """
        return not self.low <= 0 <= self.high


class Comparison(NamedTuple):
    """Two rows on the same questions and on the seeds that both have. The loss is in nats per
    answer token.
    """

    accuracy: Difference
    loss: Difference
    seeds: tuple[int, ...]


class Paired(NamedTuple):
    """The differences of two rows' outcomes: `correct` and `nats` of shape (seeds, questions), and
    the `tokens` of the questions.
    """

    correct: Array
    nats: Array
    tokens: Array
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """The outcomes of one row.

    Attributes:
        seeds: None for the base, which no seed changes. Its one line of outcomes stands for all
            seeds.
        correct: 0 or 1, shape (seeds, questions).
        nats: of the reference answers, shape (seeds, questions).
        tokens: of the reference answers, shape (questions,).
    """

    seeds: tuple[int, ...] | None
    correct: Array
    nats: Array
    tokens: Array

    @property
    def accuracy(self) -> Estimate:
        return estimate(self.correct, np.ones(len(self.tokens)))

    @property
    def loss(self) -> Estimate:
        return estimate(self.nats, self.tokens)

    def of(self, seeds: tuple[int, ...]) -> tuple[Array, Array]:
        """`correct` and `nats` of these seeds, in this order."""
        lines = [0 if self.seeds is None else self.seeds.index(seed) for seed in seeds]
        return self.correct[lines], self.nats[lines]


def scores_of(runs: Sequence[Sequence[Outcome]], seeds: tuple[int, ...] | None) -> Scores:
    """The outcomes of one row's runs on the same questions. There is one run for each seed."""
    correct = np.array(
        [[outcome.correct for outcome in outcomes] for outcomes in runs], dtype=float
    )
    nats = np.array([[outcome.nats for outcome in outcomes] for outcomes in runs])
    tokens = np.array([outcome.tokens for outcome in runs[0]], dtype=float)
    return Scores(seeds, correct, nats, tokens)


def paired(row: Scores, reference: Scores) -> Paired | None:
    """`row` minus `reference` on the same questions and on the seeds that both have.

    None if they have no seed in common.
    """
    seeds = _common_seeds(row, reference)
    if not seeds:
        return None
    correct, nats = row.of(seeds)
    reference_correct, reference_nats = reference.of(seeds)
    return Paired(correct - reference_correct, nats - reference_nats, row.tokens, seeds)


def compare(row: Scores, reference: Scores) -> Comparison | None:
    """The difference of two rows with its intervals; None if they have no seed in common."""
    pair = paired(row, reference)
    return None if pair is None else comparison_of(pair)


def comparison_of(pair: Paired) -> Comparison:
    """The intervals of a difference."""
    return Comparison(
        accuracy=difference(pair.correct, np.ones(len(pair.tokens))),
        loss=difference(pair.nats, pair.tokens),
        seeds=pair.seeds,
    )


def _common_seeds(row: Scores, reference: Scores) -> tuple[int, ...]:
    given = [set(scores.seeds) for scores in (row, reference) if scores.seeds is not None]
    if not given:
        return (0,)  # both lines stand for any seed
    return tuple(sorted(set.intersection(*given)))


def estimate(values: Array, weights: Array) -> Estimate:
    """The ratio of the sum of `values` to the sum of `weights`, with its standard error.

    `values` has the shape (seeds, questions), `weights` the shape (questions,). For the accuracy of
    one seed the error is the binomial √(p (1 - p) / n).
    """
    z = _linearised(values, weights)
    question_variance = z.mean(0).var() / z.shape[1]
    error = np.sqrt(question_variance + _seed_variance(z))
    return Estimate(float(z.mean()), float(error))


def difference(values: Array, weights: Array) -> Difference:
    """The same ratio with its bootstrap interval. `values` are differences between two rows."""
    low, high = np.quantile(
        resampled(values, weights), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    )
    return Difference(float(_linearised(values, weights).mean()), float(low), float(high))


def resampled(values: Array, weights: Array, number: int = 0) -> Array:
    """The ratio in every resample, shape (2 * RESAMPLES,).

    Every call draws the same questions. The moves of the seeds are others for another `number`.
    """
    counts = _resamples(len(weights))
    ratios = (counts @ values.mean(0)) / (counts @ weights)
    spread = np.sqrt(_seed_variance(_linearised(values, weights)))
    moves = spread * _seed_draws(len(values), number)
    # With both signs, swapping the two rows mirrors the interval exactly.
    both: Array = np.concatenate([ratios + moves, ratios - moves])
    return both


def _linearised(values: Array, weights: Array) -> Array:
    ratio = values.mean(0).sum() / weights.sum()
    result: Array = ratio + (values - ratio * weights) / weights.mean()
    return result


def _seed_variance(z: Array) -> float:
    """τ² / S. It is 0 with one seed, which says nothing about others."""
    seeds, questions = z.shape
    if seeds == 1 or questions == 1:
        return 0.0
    means = z.mean(1)
    residual = z - z.mean(0) - means[:, None] + z.mean()
    chance = (residual**2).sum() / ((seeds - 1) * (questions - 1)) / questions
    return float(max(0.0, means.var(ddof=1) - chance) / seeds)


@functools.lru_cache(maxsize=2)
def _resamples(questions: int) -> Array:
    """How often each resample draws each question, shape (RESAMPLES, questions).

    It is the same in every call, so that a table can be made again from the results.
    """
    random = np.random.default_rng(questions)
    counts = np.empty((RESAMPLES, questions), np.float32)
    for resample in range(RESAMPLES):
        drawn = random.integers(questions, size=questions)
        counts[resample] = np.bincount(drawn, minlength=questions)
    return counts


def _seed_draws(seeds: int, number: int) -> Array:
    """A draw of Student's t for each resample."""
    if seeds == 1:
        return np.zeros(RESAMPLES)
    return np.random.default_rng((seeds, number)).standard_t(seeds - 1, RESAMPLES)
