"""The embedded benchmark: a small pretrained model, and the word problems it is adapted to."""

from pathlib import Path

from lora_lite_benchmark.tiny.problems import (
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
