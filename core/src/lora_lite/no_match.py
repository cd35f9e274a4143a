"""The error for a pattern that matches no layer: it shows the layers that there are."""

import re
from collections import Counter
from collections.abc import Sequence

from lora_lite.errors import TargetError, did_you_mean
from lora_lite.find import Layer


def no_match(argument: str, pattern: re.Pattern[str], layers: Sequence[Layer]) -> TargetError:
    """The error; if the pattern matches a module that holds layers, it says how to choose those."""
    inside = [layer.path for layer in layers if _lies_in(layer, pattern)]
    if inside:
        longer = pattern.pattern.removesuffix("$") + r"\."
        return TargetError(
            f"{argument}={pattern.pattern!r} matches a module that is no layer; inside it are",
            details=inside,
            expected="Patterns are searched for in the paths of layers",
            fix=f"To choose all layers inside it, write {longer!r}",
            argument=argument,
            layers=inside,
        )
    return TargetError(
        f"{argument}={pattern.pattern!r} matches none of these layers",
        details=names_with_counts(layers),
        expected="Every pattern must match at least one layer",
        fix=did_you_mean(pattern.pattern.strip("^$."), _names(layers)),
        argument=argument,
    )


def _lies_in(layer: Layer, pattern: re.Pattern[str]) -> bool:
    """Whether a pattern matches one of the modules around a layer."""
    return any(
        pattern.search(path[:end])
        for path in layer.paths
        for end, letter in enumerate(path)
        if letter == "."
    )


def _names(layers: Sequence[Layer]) -> set[str]:
    """Every name in the paths of the layers, without the indices."""
    names: set[str] = set()
    for layer in layers:
        names.update(layer.path.split("."))
    return {name for name in names if not name.isdigit()}


def names_with_counts(layers: Sequence[Layer]) -> list[str]:
    """What the layers are called in their parents, and how often: `q_proj x 32`."""
    counts = Counter(layer.path.rpartition(".")[2] for layer in layers)
    return [f"{name} x {count}" for name, count in counts.items()]
