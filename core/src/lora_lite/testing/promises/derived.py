"""What follows from the base alone: it must come out the same every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lite.testing.case import Case
from lora_lite.testing.compare import all_same, close
from lora_lite.testing.promise import promise


@promise(examples=8)
def derived_tensors_come_again(case: Case) -> None:
    """What `derive` computes from the base, it computes again: bit for bit from the same weights,
    up to rounding from a copy of them in another layer, from weights that differ in the last bits,
    and where a decomposition gives its vectors with other signs, as another machine's may. Without
    data or random draws.

    A small adapter file leaves these tensors out. Usually broken by singular vectors without a
    fixed sign (see `lora_lite.author.top_r_svd`), by a randomised decomposition without a fixed
    start, or by a cache.
    """
    case = case.but(dtype=torch.float64)
    model, twin, nudged = case.model(), case.but(kind="Linear").model(), case.model()
    twins, noise = case.sites(twin), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, site in case.sites(model).items():
            twins[path].weight().copy_(site.weight())
        for parameter in nudged.parameters():
            parameter.mul_(1 + 1e-12 * torch.randn(parameter.shape, generator=noise))
    for path, site in case.sites(model).items():
        derived = case.variant.derive(site)
        torch.manual_seed(3)
        all_same(case.variant.derive(site), derived, "derive, called again")

        def compare(found: dict[str, Tensor], what: str, expected: dict[str, Tensor]) -> None:
            for name, value in found.items():
                close(value, expected[name], f"{name}, derived {what}", tolerance=1e-6)

        compare(case.variant.derive(twins[path]), "on a copy", derived)
        nearby = case.variant.derive(case.sites(nudged)[path])
        compare(nearby, "on weights that differ by 1e-12", derived)
        for first in (1, -1):
            with OtherSigns(first):
                turned = case.variant.derive(site)
            compare(turned, "with other signs of a decomposition", derived)


class OtherSigns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns every second vector of a decomposition round, beginning with the `first` or the next.

    A = (U D) S (V D)ᵀ holds for any D of signs.
    """

    def __init__(self, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first = first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation; the vectors of svd and eigh, and of qr with its R, get other signs."""
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_linalg_svd":
            u, s, vh = found
            return self._turned(u), s, self._turned(vh.mT).mT
        if name == "_linalg_eigh":
            values, vectors = found
            return values, self._turned(vectors)
        if name == "linalg_qr":
            q, r = found
            return self._turned(q), self._turned(r.mT).mT
        return found

    def _turned(self, vectors: Tensor) -> Tensor:
        vectors = vectors.clone()
        vectors[..., ::2] *= self.first
        vectors[..., 1::2] *= -self.first
        return vectors
