"""Pretrain the shipped model: `python -m lora_lite_benchmark.tiny.pretrain --out DIR`.

It learns problems of the country `HOME`, which takes about half an hour on two CPU cores.
`lora_lite_benchmark/pretraining.py` says how, and what happens when it is interrupted.
"""

from random import Random

from lora_lite_benchmark.pretraining import Pretraining, pretrain
from lora_lite_benchmark.tiny.problems import HOME, problem


def problem_at_home(random: Random) -> tuple[str, str]:
    """A (question, answer) of the country that the model grew up in."""
    return problem(HOME, random)


PRETRAINING = Pretraining(problem_at_home, batch_size=32, steps=3000)

if __name__ == "__main__":
    pretrain(PRETRAINING, __doc__)
