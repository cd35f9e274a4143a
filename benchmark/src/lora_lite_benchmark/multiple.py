"""Several comparisons at once.

Of twenty rows that are as good as LoRA, one is separable from it by chance, since an interval of
95 % misses one time in twenty. So a table states for each difference the probability p that one as
large, measured by its own interval, is found anywhere in the family if there is none:

    T_k = |d_k| / s_k                                s_k: half of the interval of 95 %
    Z_k = |d*_k - mean d*_k| / s_k                   in each resample
    p_(1) = P(max of all Z_k >= T_(1))               for the largest T
    p_(j) = P(max of the Z_k from the j-th on >= T_(j)), and at least p_(j-1)

This is the step-down max-T procedure of Westfall & Young (1993), with the bootstrap of `stats.py`
in the place of permutations (Romano & Wolf 2005, doi:10.1198/016214504000000539). A resample draws
the same questions for all comparisons, so that what they have in common is counted once. p is at
least 1 / (1 + resamples).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_lite_benchmark.stats import Array, Paired, resampled

__all__ = ["SIGNIFICANT", "Adjusted", "adjusted", "adjusted_p"]

SIGNIFICANT = 0.05
"""A difference with a smaller p is one."""


class Adjusted(NamedTuple):
    """The two p of one comparison, adjusted for all of its family."""

    accuracy: float
    loss: float


def adjusted(family: Sequence[Paired]) -> list[Adjusted]:
    """The p of every comparison of a family, in its order. All are of the same questions."""
    if not family:
        return []
    tokens = family[0].tokens
    accuracies = adjusted_p([pair.correct for pair in family], np.ones(len(tokens)))
    losses = adjusted_p([pair.nats for pair in family], tokens)
    return [Adjusted(*both) for both in zip(accuracies, losses, strict=True)]


def adjusted_p(family: Sequence[Array], weights: Array) -> list[float]:
    """The p of differences of shape (seeds, questions), each a ratio of sums as in `stats.py`."""
    draws = np.stack([resampled(values, weights, number) for number, values in enumerate(family)])
    low, high = np.quantile(draws, [0.025, 0.975], axis=1)
    errors = (high - low)[:, None] / 2
    # Two rows with the same outcomes differ by nothing, and never seem to.
    errors[errors == 0] = np.inf
    observed = np.abs(draws.mean(axis=1, keepdims=True) / errors)[:, 0]
    chance = np.abs(draws - draws.mean(axis=1, keepdims=True)) / errors
    order = np.argsort(-observed)
    largest_left = np.maximum.accumulate(chance[order[::-1]], axis=0)[::-1]
    exceeding = (largest_left >= observed[order, None]).sum(axis=1)
    found = np.empty(len(family))
    found[order] = np.maximum.accumulate((1 + exceeding) / (1 + draws.shape[1]))
    return [float(p) for p in found]
