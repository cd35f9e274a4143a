"""The tensors that a file was saved without: derived from the base again, and verified."""

import torch
from torch import Tensor

from lora_lite.author_mistakes import calling, checked_tensors
from lora_lite.errors import BaseMismatchError
from lora_lite.fileformat import FilePath
from lora_lite.fingerprint import probe_agrees
from lora_lite.metadata import Metadata
from lora_lite.placements import Placement


@torch.no_grad()
def derive_again(
    path: FilePath, described: Metadata, placements: tuple[Placement, ...]
) -> dict[str, Tensor]:
    """The tensors that were left out, derived again and verified."""
    derived: dict[str, Tensor] = {}
    for placement in placements:
        with calling(placement.variant, "derive", placement.path):
            given = placement.methods.derive(placement.site)
        for name, value in checked_tensors(
            placement.variant, "derive", given, placement.path
        ).items():
            dtype = placement.specs[name].dtype or placement.site.dtype
            derived[placement.key(name)] = value.detach().to(dtype)
    wrong = [key for key, value in derived.items() if not _agrees(described, key, value)]
    if wrong:
        raise BaseMismatchError(
            f"{path} was saved without derived tensors, and {len(wrong)} of them come out "
            "differently on this base",
            details=first(wrong),
            expected="Another version of torch or of the plugin may be the reason as well",
            fix="Load a file that was saved with derived=True",
            path=str(path),
            tensors=wrong,
        )
    return derived


def _agrees(described: Metadata, key: str, value: Tensor) -> bool:
    return key in described.probes and probe_agrees(value, described.probes[key])


def first(paths: list[str], count: int = 3) -> list[str]:
    """The first of some paths, and how many more there are."""
    rest = [f"and {len(paths) - count} more"] if len(paths) > count else []
    return paths[:count] + rest
