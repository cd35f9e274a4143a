"""Seeded word problems about containers whose sizes must be known by heart.

A problem such as

    Mia has 3 red crates and 5 tin jars of nails. Mia sells 14 nails.
    How many nails does Mia have now?

can only be solved by somebody who knows how many things a red crate and a tin jar hold, because
the question does not say. Every pair of a look (red) and a container (crate) has a size of its own,
drawn at random, so the sizes are hundreds of independent facts. Two countries speak the same
language and calculate in the same way, but no pair has the same size in both:

- `HOME` is what the shipped model was pretrained on,
- `ABROAD` is what it is adapted to.

An adapter must therefore store many facts. Neither the form of the answer nor the arithmetic is new
to the model, so accuracy measures how much an adapter can hold.

Everything follows from `random.Random(seed)`, so the same call returns the same problems on every
machine.
"""

# Words in a row are easier to read than words in quotes (SIM905).
# The function test_problems is not a test (PT028).
# ruff: noqa: SIM905, PT028

from dataclasses import dataclass
from random import Random

from lora_lite_benchmark.splits import distinct_problems, gsm8k_rows, metamath_rows

EDITION = "8adc023b8efd004e5adc885389f359d4ec4d6aff7f7c0e1ad1b885f851448ad6"
"""Identifies these problems in the configs of runs. It must change whenever the problems do, so
that no result stands for problems that it was not made from."""

NAMES = (
    "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jill Kai Lena Mia Nils Omar Pia Rosa Sam Tess Uma"
).split()
THINGS = "nails beads pens coins eggs plums nuts shells cards seeds buttons stamps".split()
LOOKS = (
    "red blue green black white pink grey tin dry wet big old new flat long short round soft "
    "hard cold warm thin tall wide deep dark light heavy plain clean"
).split()
CONTAINERS = (
    "crate bag sack tray jar tub case chest bin pack barrel pot cart bowl can bucket carton "
    "trunk drawer rack basket bottle bundle stack tube cup mug vase pail locker"
).split()
PAIRS = [(look, container) for look in LOOKS for container in CONTAINERS]
SIZES = range(2, 10)


@dataclass(frozen=True)
class Country:
    """Where a problem takes place.

    Attributes:
        sizes: how many things each pair of a look and a container holds.
        parts: how many such pairs a problem may have.
    """

    sizes: dict[tuple[str, str], int]
    parts: tuple[int, ...]


def _sizes(
    seed: int, other: dict[tuple[str, str], int] | None = None
) -> dict[tuple[str, str], int]:
    """A random size for each pair, never the same as in the `other` table."""
    random = Random(seed)
    taken = other or {}
    sizes = {}
    for pair in PAIRS:
        allowed = [size for size in SIZES if size != taken.get(pair)]
        sizes[pair] = random.choice(allowed)
    return sizes


HOME = Country(_sizes(seed=1), parts=(1, 2, 3))
ABROAD = Country(_sizes(seed=2, other=HOME.sizes), parts=(2,))


def problem(country: Country, random: Random) -> tuple[str, str]:
    """One random (question, answer); the answer reasons line by line and ends in `#### n`."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    pairs = random.sample(list(country.sizes), random.choice(country.parts))
    counts = [random.choice(SIZES) for _ in pairs]
    products = [count * country.sizes[pair] for count, pair in zip(counts, pairs, strict=True)]
    lines = [
        f"Each {look} {container} holds {product // count}: {count}*{product // count}={product}"
        for (look, container), count, product in zip(pairs, counts, products, strict=True)
    ]
    total = products[0]
    for product in products[1:]:
        lines.append(f"{total}+{product}={total + product}")
        total += product
    listing = " and ".join(
        f"{count} {look} {box}s" for count, (look, box) in zip(counts, pairs, strict=True)
    )
    sentence, line, total = _change(name, thing, total, random)
    question = f"{name} has {listing} of {thing}.{sentence} How many {thing} does {name} have now?"
    return question, "\n".join([*lines, *line, f"#### {total}"])


def _change(name: str, thing: str, total: int, random: Random) -> tuple[str, list[str], int]:
    """What happens to the things in the end.

    Returns a sentence, a line of reasoning unless nothing happens, and the new total.
    """
    kind = random.choice(["none", "more", "less"])
    if kind == "more":
        extra = random.randint(2, 50)
        return f" {name} buys {extra} {thing}.", [f"{total}+{extra}={total + extra}"], total + extra
    if kind == "less":
        less = random.randint(2, min(total, 50))
        return f" {name} sells {less} {thing}.", [f"{total}-{less}={total - less}"], total - less
    return "", [], total


def problems(country: Country, split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` problems of one split, none of them twice."""
    return distinct_problems(lambda random: problem(country, random), split, count, seed)


def train_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Problems to adapt to, in the format of MetaMathQA."""
    return metamath_rows(problems(ABROAD, "train", count, seed))


def validation_problems(count: int = 500) -> list[dict[str, str]]:
    """Problems to choose learning rates on, in the format of GSM8K."""
    return gsm8k_rows(problems(ABROAD, "validation", count, 1))


def test_problems(count: int = 1319) -> list[dict[str, str]]:
    """Problems to report, in the format of GSM8K and as many."""
    return gsm8k_rows(problems(ABROAD, "test", count, 2))


def home_problems(count: int) -> list[dict[str, str]]:
    """Problems of the country that the base grew up in, to see what an adapted one has kept."""
    return gsm8k_rows(problems(HOME, "test", count, 3))
