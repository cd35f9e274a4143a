"""Splits of generated problems. No two splits share a question, whatever the seeds are.

The split of a question follows from its text alone, by a hash.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from random import Random

__all__ = ["distinct_problems", "gsm8k_rows", "metamath_rows", "split_of"]

Problems = Iterable[tuple[str, str]]

SPLITS = ("train", "train", "train", "train", "train", "train", "validation", "test")
"""The split of a question, by its hash modulo 8."""


def split_of(question: str) -> str:
    """The split to which a question belongs, by a hash of its text."""
    return SPLITS[hashlib.sha256(question.encode()).digest()[0] % len(SPLITS)]


def distinct_problems(
    make: Callable[[Random], tuple[str, str]], split: str, count: int, seed: int
) -> list[tuple[str, str]]:
    """`count` (question, answer) pairs of one split, none of them twice.

    Args:
        make: a random problem.
        split: "train", "validation" or "test".
        count: how many.
        seed: of the random numbers that `make` draws from.
    """
    return list(islice(_distinct(make, split, Random(seed)), count))


def _distinct(
    make: Callable[[Random], tuple[str, str]], split: str, random: Random
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    while True:
        question, answer = make(random)
        if question not in seen and split_of(question) == split:
            seen.add(question)
            yield question, answer


def metamath_rows(problems: Problems) -> list[dict[str, str]]:
    """(question, answer) pairs in the format of MetaMathQA."""
    return [{"query": question, "response": answer} for question, answer in problems]


def gsm8k_rows(problems: Problems) -> list[dict[str, str]]:
    """(question, answer) pairs in the format of GSM8K."""
    return [{"question": question, "answer": answer} for question, answer in problems]
