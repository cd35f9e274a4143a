"""Seeded word problems about rules of counting, of which the right one must be chosen.

A problem such as

    Mia is at the mill. Mia has 842 nails, 214 come and 95 go. How many nails does Mia count?

has eight answers, because there are eight rules of counting. The shipped model knows all of them,
and two customs that say which rule holds at which place. At `home`, a sentence names the rule or
the custom ("Count by net.", "Count by old custom."). If there is none, any rule may be meant.

The model is adapted to problems `abroad`, where no sentence names anything: at half of the places
the old custom holds, at the other half the new one. The shipped model answers with a mixture of
rules and is seldom right, although it can follow every rule that is asked for. An adapter need not
teach it anything. It must only make it choose, so accuracy measures how well an adapter redirects
what a model knows.

Everything follows from `random.Random(seed)`, so the same call returns the same problems on every
machine.
"""

# Words in a row are easier to read than words in quotes (SIM905).
# The function test_problems is not a test (PT028).
# ruff: noqa: SIM905, PT028

from random import Random

from lora_lite_benchmark.splits import distinct_problems, gsm8k_rows, metamath_rows

EDITION = "8e553baae8abf962096d4adb9cd1514393ca635ed578b1a80f85cfeeac163d1c"
"""Identifies these problems in the configs of runs. It must change whenever the problems do, so
that no result stands for problems that it was not made from."""

NAMES = (
    "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jill Kai Lena Mia Nils Omar Pia Rosa Sam Tess Uma"
).split()
THINGS = "nails beads pens coins eggs plums nuts shells cards seeds buttons stamps".split()
PLACES = "farm port mill shop mine camp fair barn".split()

RULES = {
    "all": "has + come + go",
    "net": "has + come - go",
    "swap": "has - come + go",
    "rest": "has - come - go",
    "twice": "has + come + result",
    "gap": "has - come + result",
    "first": "has + come + has",
    "ends": "has + go + go",
}
"""Two sums each: `result` is that of the first."""

OLD_CUSTOM = dict(zip(PLACES, "gap ends all first rest twice net swap".split(), strict=True))
NEW_CUSTOM = dict(zip(PLACES, "all first rest twice net swap gap ends".split(), strict=True))
RULES_ABROAD = {
    place: (OLD_CUSTOM if index % 2 == 0 else NEW_CUSTOM)[place]
    for index, place in enumerate(PLACES)
}


def problem_at_home(random: Random) -> tuple[str, str]:
    """A (question, answer) of the kind that the shipped model was pretrained on."""
    place = random.choice(PLACES)
    rule = random.choice(list(RULES))
    kind = random.random()
    if kind < 0.6:
        return _problem(place, rule, f" Count by {rule}.", random)
    if kind < 0.75:
        return _problem(place, OLD_CUSTOM[place], " Count by old custom.", random)
    if kind < 0.9:
        return _problem(place, NEW_CUSTOM[place], " Count by new custom.", random)
    return _problem(place, rule, "", random)


def problem_abroad(random: Random) -> tuple[str, str]:
    """A (question, answer) of the kind that the shipped model is adapted to."""
    place = random.choice(PLACES)
    return _problem(place, RULES_ABROAD[place], "", random)


def _problem(place: str, rule: str, request: str, random: Random) -> tuple[str, str]:
    """The answer names the place and its rule, calculates line by line, and ends in `#### n`."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    has = random.randint(333, 999)
    come = random.randint(49, has // 2)
    go = random.randint(19, has - come - 19)
    numbers = {"has": has, "come": come, "go": go}
    left, sign, right, next_sign, next_right = RULES[rule].split()
    first_sum, result = _calculate(numbers[left], sign, numbers[right])
    numbers["result"] = result
    second_sum, result = _calculate(result, next_sign, numbers[next_right])
    question = (
        f"{name} is at the {place}. {name} has {has} {thing}, {come} come and {go} go.{request} "
        f"How many {thing} does {name} count?"
    )
    return question, f"{place} {rule}\n{first_sum}\n{second_sum}\n#### {result}"


def _calculate(left: int, sign: str, right: int) -> tuple[str, int]:
    """The sum as a line of the answer, and its result."""
    result = left + right if sign == "+" else left - right
    return f"{left}{sign}{right}={result}", result


def train_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Problems to adapt to, in the format of MetaMathQA."""
    return metamath_rows(distinct_problems(problem_abroad, "train", count, seed))


def validation_problems(count: int = 500) -> list[dict[str, str]]:
    """Problems to choose learning rates on, in the format of GSM8K."""
    return gsm8k_rows(distinct_problems(problem_abroad, "validation", count, 1))


def test_problems(count: int = 1319) -> list[dict[str, str]]:
    """Problems to report, in the format of GSM8K and as many."""
    return gsm8k_rows(distinct_problems(problem_abroad, "test", count, 2))


def home_problems(count: int) -> list[dict[str, str]]:
    """Problems of which a sentence names the rule or the custom, as the base has learnt them."""
    return gsm8k_rows(distinct_problems(_named_at_home, "test", count, 3))


def _named_at_home(random: Random) -> tuple[str, str]:
    """At home, some problems name nothing, and have no right answer. Those are left out."""
    while True:
        question, answer = problem_at_home(random)
        if " Count by " in question:
            return question, answer
