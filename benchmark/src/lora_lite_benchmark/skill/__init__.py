"""The second embedded task: a small pretrained model, and the word problems that it is adapted to.

It can solve all of them as soon as it knows which of its rules is meant.
"""

from pathlib import Path

from lora_lite_benchmark.skill.problems import (
    EDITION,
    home_problems,
    test_problems,
    train_problems,
    validation_problems,
)

MODEL_DIR = Path(__file__).parent / "model"
"""The directory of the model and its tokenizer, for `from_pretrained`."""

__all__ = [
    "EDITION",
    "MODEL_DIR",
    "home_problems",
    "test_problems",
    "train_problems",
    "validation_problems",
]
