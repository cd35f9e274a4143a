"""How sure a figure is: standard errors, and intervals of differences between rows on the same questions.

Accuracy and loss are one thing here, a ratio of sums over questions: right answers over questions, or nats over answer
tokens. A row has such values for each seed and question, x of shape (seeds, questions); its figure is
R = mean over seeds of Σᵢ xₛᵢ / Σᵢ wᵢ, with w = 1 for accuracy and w = tokens for the loss.

Two things vary. **Questions**: another test set would give another figure; the questions are the same for all seeds, and
for both sides of a difference. **Seeds**: another seed would have trained another adapter. With deviations linearised,
zₛᵢ = R + (xₛᵢ - R wᵢ) / mean(w), the variance of R is estimated as

    var(R) = varᵢ(meanₛ z) / n + τ² / S,    τ² = max(0, varₛ(meanᵢ z) - varₛᵢ(residual) / n),

where τ² is what the seeds' figures vary beyond what chance outcomes of single questions explain.

The interval of a difference is a paired bootstrap. Each resample draws n questions with replacement, the same for both rows
and for all seeds, and takes the ratio of sums anew. With several seeds it also moves by τ / √S times a draw of Student's t
with S - 1 degrees of freedom: three seeds are too few to be resampled (where seeds dominate, that covers 77 % and not 95 %).
The 2.5th and 97.5th percentiles are the interval. Pigeonhole resampling of questions and seeds is Owen, arXiv:0712.1111.
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
    "Scores",
    "compare",
    "difference",
    "estimate",
    "scores_of",
]

RESAMPLES = 10_000
CONFIDENCE = 0.95

Array = NDArray[Any]


class Estimate(NamedTuple):
    value: float
    error: float  # one standard error


class Difference(NamedTuple):
    """`value` with its 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float

    @property
    def separable(self) -> bool:
        """Whether the interval leaves 0 out. Two rows with the same outcomes never are."""
        return not self.low <= 0 <= self.high


class Comparison(NamedTuple):
    accuracy: Difference
    loss: Difference  # nats per answer token
    seeds: tuple[int, ...]  # those that both rows have


@dataclass(frozen=True, eq=False)
class Scores:
    """One row's outcomes: `correct` and `nats` of shape (seeds, questions), `tokens` of shape (questions,).

    `seeds` is None for a row that no seed changes, the base: it has one line of outcomes, which stands for every seed's.
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
    """The outcomes of the runs of one row on the same questions, one sequence for each of `seeds`."""
    correct = np.array(
        [[outcome.correct for outcome in outcomes] for outcomes in runs], dtype=float
    )
    nats = np.array([[outcome.nats for outcome in outcomes] for outcomes in runs])
    tokens = np.array([outcome.tokens for outcome in runs[0]], dtype=float)
    return Scores(seeds, correct, nats, tokens)


def compare(row: Scores, reference: Scores) -> Comparison | None:
    """`row` minus `reference` on the same questions and the seeds they share; None if they share no seed."""
    given = [set(scores.seeds) for scores in (row, reference) if scores.seeds is not None]
    seeds = tuple(sorted(set.intersection(*given))) if given else (0,)
    if not seeds:
        return None
    (correct, nats), (other_correct, other_nats) = row.of(seeds), reference.of(seeds)
    return Comparison(
        difference(correct - other_correct, np.ones(len(row.tokens))),
        difference(nats - other_nats, row.tokens),
        seeds,
    )


def estimate(values: Array, weights: Array) -> Estimate:
    """The ratio of sums of `values`, shape (seeds, questions), to `weights`, shape (questions,), and its standard error.

    For one seed's accuracy the error is the binomial √(p (1 - p) / n).
    """
    z = _linearised(values, weights)
    return Estimate(
        float(z.mean()), float(np.sqrt(z.mean(0).var() / z.shape[1] + _seed_variance(z)))
    )


def difference(values: Array, weights: Array) -> Difference:
    """The same ratio for `values` that are differences between two rows, with its bootstrap interval."""
    counts, draws = _resamples(len(weights)), _seed_draws(len(values))
    z = _linearised(values, weights)
    ratios = (counts @ values.mean(0)) / (counts @ weights)
    moves = np.sqrt(_seed_variance(z)) * draws
    resampled = np.concatenate(
        [ratios + moves, ratios - moves]
    )  # both signs: swapping the rows mirrors the interval
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(z.mean()), float(low), float(high))


def _linearised(values: Array, weights: Array) -> Array:
    ratio = values.mean(0).sum() / weights.sum()
    result: Array = ratio + (values - ratio * weights) / weights.mean()
    return result


def _seed_variance(z: Array) -> float:
    """τ² / S; 0 with one seed, which says nothing about others."""
    seeds, questions = z.shape
    if seeds == 1 or questions == 1:
        return 0.0
    means = z.mean(1)
    residual = z - z.mean(0) - means[:, None] + z.mean()
    chance = (residual**2).sum() / ((seeds - 1) * (questions - 1)) / questions
    return float(max(0.0, means.var(ddof=1) - chance) / seeds)


@functools.lru_cache(maxsize=2)
def _resamples(questions: int) -> Array:
    """How often each resample draws each question, shape (RESAMPLES, questions). The same in every call."""
    random = np.random.default_rng(questions)
    draws = (random.integers(questions, size=questions) for _ in range(RESAMPLES))
    return np.stack([np.bincount(draw, minlength=questions).astype(np.float32) for draw in draws])


@functools.lru_cache(maxsize=16)
def _seed_draws(seeds: int) -> Array:
    if seeds == 1:
        return np.zeros(RESAMPLES)
    return np.random.default_rng(seeds).standard_t(seeds - 1, RESAMPLES)
