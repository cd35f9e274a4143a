"""Rows with the same number of parameters: the rank of each that comes nearest.

    lora-lite-bench run --variants lora dora vera --parameters 8k

Parameters are counted on a model without weights, so a large one costs nothing. A variant that has
no rank keeps the size that it has.
"""

import math
from collections.abc import Iterable

import lora_lite as ll
from torch import nn

from lora_lite_benchmark.config import SPECIAL_ROWS, RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_skeleton
from lora_lite_benchmark.variants import adapter_arguments

__all__ = ["RANK", "nearest_rank", "parse_count"]

RANK = "r"
UNITS = {"": 1, "k": 1_000, "m": 1_000_000}

COARSE = sorted({(8 + part) << octave >> 3 for octave in range(14) for part in range(8)})
"""Ranks from 1 to 15,360, eight in each octave: 1, 2, 3, …, 16, 18, 20, …"""


def parse_count(text: str) -> int:
    """8000, 8k and 1.5M are counts of parameters."""
    digits = text.rstrip("kKmM")
    try:
        count = round(float(digits) * UNITS[text[len(digits) :].lower()])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise BenchmarkError(
            f"--parameters is {text!r}", expected="A count of parameters, such as 8000, 8k or 1.5M"
        )
    return count


def nearest_rank(config: RunConfig, wanted: int) -> int | None:
    """The rank at which the row has as nearly `wanted` parameters as it can have.

    None if it has no rank. "Nearly" is by ratio: half as many are as far off as twice as many.
    Ranks that the variant or the layers do not allow are passed over.

    Raises:
        BenchmarkError: no rank fits.
    """
    if config.variant in SPECIAL_ROWS or RANK not in config.fields:
        return None
    skeleton = load_skeleton(config)

    def off(rank: int) -> float:
        return abs(math.log(counts[rank] / wanted))

    counts = _counts(skeleton, config, COARSE)
    if not counts:
        raise BenchmarkError(
            f"no rank of {config.label!r} fits the layers", fix="Leave out --parameters for it"
        )
    best = min(counts, key=off)
    place = COARSE.index(best)
    around = range(COARSE[max(place - 1, 0)], COARSE[min(place + 1, len(COARSE) - 1)])
    counts |= _counts(skeleton, config, around)
    return min(counts, key=off)


def _counts(skeleton: nn.Module, config: RunConfig, ranks: Iterable[int]) -> dict[int, int]:
    """The parameters at each of the ranks that fit."""
    found: dict[int, int] = {}
    for rank in ranks:
        sized = config.model_copy(update={"fields": {**config.fields, RANK: rank}})
        try:
            plan = ll.plan(skeleton, config.variant, **adapter_arguments(sized))
        except ll.LoraLiteError:
            continue
        found[rank] = plan.parameters
    return found
