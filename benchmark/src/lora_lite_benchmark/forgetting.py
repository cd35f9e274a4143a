"""What an adapter makes its base forget.

The loss on held-out text of the base's own distribution is measured before training, without the
adapter, and after it. At some scales of the adapter, from 0 (the base) to beyond 1 (the adapter),
the same is measured again beside the loss on the task: how much each of them changes on the way.
"""

from collections.abc import Sequence

import lora_lite as ll

from lora_lite_benchmark.data import Example, encode, held_out_examples
from lora_lite_benchmark.evaluate import weigh
from lora_lite_benchmark.results import AtScale, Forgetting
from lora_lite_benchmark.setup import Setup
from lora_lite_benchmark.variants import AnyAdapter

__all__ = ["Before", "before", "forgetting"]

AT_SCALES = 100
"""How many texts and problems are looked at for each scale."""

Before = tuple[list[Example], list[float]]
"""The texts, and the nats of each under the base."""


def before(setup: Setup, adapter: AnyAdapter) -> Before | None:
    """What the base makes of the texts; None if the run has none, or trains nothing.

    The rows without an adapter have their base until they are trained.
    """
    if setup.config.forgetting is None or not setup.trains:
        return None
    texts = held_out_examples(setup.tokenizer, setup.config)
    with adapter.disabled():
        return texts, _nats(setup, texts)


def forgetting(setup: Setup, adapter: AnyAdapter, base: Before | None) -> Forgetting | None:
    """What the trained model makes of the texts that the base was shown."""
    if base is None:
        return None
    texts, nats_before = base
    with adapter.frozen():
        nats_after = _nats(setup, texts)
    tokens = [len(text.ids) - text.start for text in texts]
    return Forgetting(
        before=tuple(nats_before),
        after=tuple(nats_after),
        tokens=tuple(tokens),
        scales=tuple(_at_scales(setup, adapter, texts)),
    )


def _at_scales(setup: Setup, adapter: AnyAdapter, texts: Sequence[Example]) -> list[AtScale]:
    """Other implementations and full fine-tuning have no scale."""
    config = setup.config
    problems = setup.problems.get("test") or setup.problems.get("validation")
    if not isinstance(adapter, ll.Adapter) or problems is None:
        return []
    task = [encode(setup.tokenizer, config.prompt, problem) for problem in problems[:AT_SCALES]]
    found = []
    for scale in config.scales:
        adapter.scale = scale
        with adapter.frozen():
            found.append(
                AtScale(
                    scale=scale,
                    held_out_loss=_loss(setup, texts[:AT_SCALES]),
                    task_loss=_loss(setup, task),
                )
            )
    adapter.scale = 1.0
    return found


def _nats(setup: Setup, examples: Sequence[Example]) -> list[float]:
    return [nats for nats, _tokens in _weigh(setup, examples)]


def _loss(setup: Setup, examples: Sequence[Example]) -> float:
    weighed = _weigh(setup, examples)
    return sum(nats for nats, _ in weighed) / sum(tokens for _, tokens in weighed)


def _weigh(setup: Setup, examples: Sequence[Example]) -> list[tuple[float, int]]:
    title = f"{setup.config.label}: held-out text"
    return weigh(setup.model, setup.tokenizer, setup.config, examples, title, setup.accelerator)
