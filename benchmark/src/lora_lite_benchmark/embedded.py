"""The tasks that come with the package: a small pretrained model each, and its word problems.

`tiny` measures how much an adapter can hold, `skill` how well it redirects what the model knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_lite_benchmark import skill, tiny

__all__ = ["TASKS", "EmbeddedTask"]


@dataclass(frozen=True)
class EmbeddedTask:
    """A model and the problems that it is adapted to.

    Attributes:
        model_dir: the model and its tokenizer, for `from_pretrained`.
        edition: identifies the problems in the configs of runs.
        train: that many training problems.
        validation: that many validation problems, or all.
        test: that many test problems, or all.
    """

    model_dir: Path
    edition: str
    train: Callable[[int], list[dict[str, str]]]
    validation: Callable[..., list[dict[str, str]]]
    test: Callable[..., list[dict[str, str]]]


TASKS = {
    "tiny": EmbeddedTask(
        tiny.MODEL_DIR,
        tiny.EDITION,
        tiny.train_problems,
        tiny.validation_problems,
        tiny.test_problems,
    ),
    "skill": EmbeddedTask(
        skill.MODEL_DIR,
        skill.EDITION,
        skill.train_problems,
        skill.validation_problems,
        skill.test_problems,
    ),
}
"""By the name that stands for the model and for its problems."""
