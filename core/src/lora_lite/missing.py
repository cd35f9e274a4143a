"""An adapter's layers that a model does not have, and what they may be called there."""

from collections.abc import Collection, Iterable

from torch import nn

from lora_lite.errors import AdapterFileError, did_you_mean
from lora_lite.fileformat import FilePath

# How many missing layers are looked up among the model's own names.
LOOKED_UP = 3


def refuse_missing(
    path: FilePath, root: nn.Module, wanted: Collection[str], modules: Collection[str]
) -> None:
    """An error if a model lacks layers of an adapter.

    Args:
        path: of the adapter's file.
        root: the model.
        wanted: the paths of the adapter's layers.
        modules: the paths of the model's modules.

    Raises:
        AdapterFileError: some are missing.
    """
    missing = [place for place in wanted if place not in modules]
    if not missing:
        return
    renaming = _renaming(wanted, modules)
    if renaming:
        fix = f"They are there under other paths: load(..., rename={renaming})"
    else:
        fix = "Load the model that the adapter was made for"
    looked_up = [_with_suggestion(place, modules) for place in missing[:LOOKED_UP]]
    raise AdapterFileError(
        f"{path} adapts {len(wanted)} layers, and {type(root).__name__} does not have "
        f"{len(missing)} of them; nothing was changed",
        details=looked_up + missing[LOOKED_UP:],
        fix=fix,
        path=str(path),
    )


def _with_suggestion(place: str, modules: Iterable[str]) -> str:
    same_name = [m for m in modules if m.rpartition(".")[2] == place.rpartition(".")[2]]
    return f"{place}. {did_you_mean(place, same_name or modules)}".rstrip(". ")


def _renaming(wanted: Collection[str], modules: Collection[str]) -> str:
    """A prefix to add or to drop that explains every missing layer, as the argument `rename=`."""
    first = next(iter(wanted))
    for prefix in _prefixes(first, modules):
        if all(f"{prefix}.{place}" in modules for place in wanted):
            return f"{{r'^': {prefix + '.'!r}}}"
    names = first.split(".")
    for count in range(1, len(names)):
        prefix = ".".join(names[:count]) + "."
        if all(p.startswith(prefix) and p.removeprefix(prefix) in modules for p in wanted):
            escaped = prefix.replace(".", r"\.")
            return f"{{r'^{escaped}': ''}}"
    return ""


def _prefixes(place: str, modules: Iterable[str]) -> list[str]:
    """What stands before `place` in the paths that end with it."""
    return [m.removesuffix(f".{place}") for m in modules if m.endswith(f".{place}")]
