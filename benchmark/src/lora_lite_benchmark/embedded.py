"""The tasks that come with the package: a small pretrained model each, and its word problems.

`measures` says of each what it shows about an adapter. Tables print it under their titles.
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
        measures: what the task tells of an adapter, in a sentence.
        train: that many training problems.
        validation: that many validation problems, or all.
        test: that many test problems, or all.
        home: that many problems of what the model was pretrained on, which it has not seen.
    """

    model_dir: Path
    edition: str
    measures: str
    train: Callable[[int], list[dict[str, str]]]
    validation: Callable[..., list[dict[str, str]]]
    test: Callable[..., list[dict[str, str]]]
    home: Callable[[int], list[dict[str, str]]]


TASKS = {
    "tiny": EmbeddedTask(
        tiny.MODEL_DIR,
        tiny.EDITION,
        "It measures how much an adapter can hold: 900 facts that the base has never seen.",
        tiny.train_problems,
        tiny.validation_problems,
        tiny.test_problems,
        tiny.home_problems,
    ),
    "skill": EmbeddedTask(
        skill.MODEL_DIR,
        skill.EDITION,
        "It measures how well an adapter redirects what the base knows: every rule and every sum, "
        "but not which rule is meant at which place.",
        skill.train_problems,
        skill.validation_problems,
        skill.test_problems,
        skill.home_problems,
    ),
}
"""By the name that stands for the model and for its problems."""
