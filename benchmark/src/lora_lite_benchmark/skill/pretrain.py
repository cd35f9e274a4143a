"""Pretrain the shipped model: `python -m lora_lite_benchmark.skill.pretrain --out DIR`.

It learns all rules and both customs, which takes about half an hour on one CPU core.
`lora_lite_benchmark/pretraining.py` says how, and what happens when it is interrupted.
"""

from lora_lite_benchmark.pretraining import Pretraining, pretrain
from lora_lite_benchmark.skill.problems import problem_at_home

PRETRAINING = Pretraining(problem_at_home, batch_size=64, steps=3000)

if __name__ == "__main__":
    pretrain(PRETRAINING, __doc__)
