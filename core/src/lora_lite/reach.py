"""Weights that no adapter can reach, although a pattern of the user's matches them."""

import re
from collections.abc import Iterable, Sequence

from lora_lite.errors import TargetError
from lora_lite.find import Layer, OtherWeight

# Bare weights that hold more than this share of the repeated blocks are not passed over.
LARGE_SHARE = 0.1

EXPERTS = (
    "They are bare parameters, as the fused experts of a mixture are: there is no layer of their "
    "own for hooks to run on"
)


def hold_much(
    weights: Iterable[OtherWeight | Layer], found: Sequence[Layer], others: Sequence[OtherWeight]
) -> bool:
    """Whether some weights are more than a tenth of all weights in the repeated blocks."""
    size = _numbers(weights)
    return size > 0 and size > LARGE_SHARE * _numbers_in_blocks(found, others)


def refuse_unreachable_weights(source: str, weights: Sequence[OtherWeight]) -> None:
    """An error for a pattern that matches layers, and large weights beside them."""
    raise TargetError(
        f"{source} also matches weights that an adapter cannot reach, and they are a large part of "
        "the model",
        details=[str(weight) for weight in weights],
        expected=EXPERTS,
        fix=f"To adapt the layers alone, leave the others out: exclude={_common_name(weights)!r}",
        argument="targets",
        layers=[weight.path for weight in weights],
    )


def refuse_unreachable_match(
    argument: str, pattern: re.Pattern[str], others: Sequence[OtherWeight]
) -> None:
    """An error if a pattern matches no layer, but does match other weights."""
    matches = [weight for weight in others if weight.has_path_like(pattern)]
    if not matches:
        return
    raise TargetError(
        f"{argument}={pattern.pattern!r} matches no layer, but weights that an adapter "
        "cannot reach",
        details=[str(weight) for weight in matches],
        expected=EXPERTS if matches[0].is_bare else "A layer that is not read is passed over",
        fix="Choose other layers; `plan` lists them",
        argument=argument,
        layers=[weight.path for weight in matches],
    )


def _common_name(weights: Sequence[OtherWeight]) -> str:
    """What the modules that hold the weights are called, such as `experts`; else one path."""
    holders = {weight.path.split(".")[-2] for weight in weights if "." in weight.path}
    names = {name for name in holders if not name.isdigit()}
    return names.pop() if len(names) == 1 else re.escape(weights[0].path)


def _numbers(weights: Iterable[OtherWeight | Layer]) -> int:
    return sum(weight.numbers for weight in weights)


def _numbers_in_blocks(found: Sequence[Layer], others: Sequence[OtherWeight]) -> int:
    linear = sum(layer.numbers for layer in found if layer.blocks)
    return linear + _numbers(weight for weight in others if weight.in_blocks)
