"""What `init` draws: from the generators that it is given, or from others."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lora_lite.testing.case import Case
from lora_lite.testing.compare import is_close

# Between two decompositions of one matrix that draw differently. Two draws are far larger apart.
DRAWN_ANEW = 0.1


def drawn(case: Case) -> set[str]:
    """The tensors for which `init` asks for a generator; none where it needs calibration data."""
    start = _Start(case)
    start.values()
    return start.asked


def drawn_from_elsewhere(case: Case) -> list[str]:
    """The trainable tensors that start elsewhere once generators which are not `rng`'s draw anew.

    A decomposition may draw for itself, because what it finds does not depend on it.
    """
    start = _Start(case)
    plain = start.values()
    with _DrawsAnew(start.given):
        anew = start.values()
    specs = case.variant.tensors(start.site)
    return [
        name
        for name, value in plain.items()
        if specs[name].trainable and not is_close(anew[name], value, DRAWN_ANEW)
    ]


class _Start:
    """The start values of one layer, and what `init` asks `rng` for.

    Attributes:
        asked: the names.
        given: the generators that were handed out.
    """

    def __init__(self, case: Case) -> None:
        self.variant = case.variant
        self.site = case.site(case.model())
        self.asked: set[str] = set()
        self.given: list[torch.Generator] = []

    def values(self) -> dict[str, torch.Tensor]:
        """What `init` gives; nothing if it needs calibration data."""
        if self.variant.observe(self.site) is not None:
            return {}
        with torch.no_grad():
            derived = self.variant.derive(self.site)
            return self.variant.init(self.site, derived, {}, self._rng)

    def _rng(self, tensor: str) -> torch.Generator:
        self.asked.add(tensor)
        self.given.append(torch.Generator().manual_seed(0))
        return self.given[-1]


class _DrawsAnew(TorchFunctionMode):
    """Random functions get another generator in place of each that is not among those `given`."""

    def __init__(self, given: list[torch.Generator]) -> None:
        super().__init__()
        self.given = given
        self.others: dict[int, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if generator is not None and not any(generator is each for each in self.given):
            seed = generator.initial_seed() + 1
            other = torch.Generator().manual_seed(seed)
            kwargs["generator"] = self.others.setdefault(id(generator), other)
        return func(*args, **kwargs)
