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
    asked, _ = _start(case)
    return asked


def drawn_from_elsewhere(case: Case) -> list[str]:
    """The trainable tensors that start elsewhere once generators which are not `rng`'s draw anew.

    A decomposition may draw for itself, because what it finds does not depend on it.
    """
    _, plain = _start(case)
    with _DrawsAnew() as own:
        _, anew = _start(case, own.given)
    specs = case.variant.tensors(case.site(case.model()))
    return [
        name
        for name, value in plain.items()
        if specs[name].trainable and not is_close(anew[name], value, DRAWN_ANEW)
    ]


def _start(
    case: Case, given: list[torch.Generator] | None = None
) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The names that `init` asks `rng` for, and what it gives; nothing if it needs data.

    Args:
        given: gets the generators that `rng` hands out.
    """
    site = case.site(case.model())
    if case.variant.observe(site) is not None:
        return set(), {}
    asked: set[str] = set()

    def rng(tensor: str) -> torch.Generator:
        asked.add(tensor)
        generator = torch.Generator().manual_seed(0)
        if given is not None:
            given.append(generator)
        return generator

    with torch.no_grad():
        return asked, case.variant.init(site, case.variant.derive(site), {}, rng)


class _DrawsAnew(TorchFunctionMode):
    """Random functions get another generator in place of each that is not among those `given`."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Generator] = []
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
