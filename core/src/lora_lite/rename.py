"""Other paths for the layers of a file: for another wrapper or another version of the model."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from lora_lite.arguments import pattern
from lora_lite.errors import AdapterFileError
from lora_lite.fileformat import FilePath
from lora_lite.metadata import Metadata
from lora_lite.variant import Tensors

Renaming = Mapping[str | re.Pattern[str], str] | None


def renamed(
    path: FilePath, described: Metadata, tensors: Tensors, rename: Renaming
) -> tuple[Metadata, dict[str, Tensor]]:
    """The file's contents with the layers' paths as this model has them.

    Raises:
        AdapterFileError: `rename` is no mapping of replacements, or makes two paths one.
    """
    if rename is None:
        return described, dict(tensors)
    new_path = new_paths(path, list(described.sites), rename)
    changes = {
        "sites": {new_path[where]: index for where, index in described.sites.items()},
        "fingerprint": {new_path.get(p, p): value for p, value in described.fingerprint.items()},
        "probes": {_new_key(key, new_path): value for key, value in described.probes.items()},
    }
    new_tensors = {_new_key(key, new_path): value for key, value in tensors.items()}
    return described.model_copy(update=changes), new_tensors


def new_paths(path: FilePath, paths: Collection[str], rename: Renaming) -> dict[str, str]:
    """The path of each layer in this model, by its path in the file.

    Raises:
        AdapterFileError: `rename` is no mapping of replacements, or makes two paths one.
    """
    if rename is None:
        return {where: where for where in paths}
    if not isinstance(rename, Mapping):
        raise AdapterFileError(
            f"rename={rename!r} is not a mapping",
            expected="It is {regular expression: replacement}",
            path=str(path),
        )
    for expression in rename:
        _refuse_unmatched(path, expression, paths)
    new_path = {where: _rewritten(where, rename) for where in paths}
    if len(set(new_path.values())) < len(new_path):
        raise AdapterFileError(
            f"rename={rename!r} gives several layers of {path} the same path", path=str(path)
        )
    return new_path


def _refuse_unmatched(path: FilePath, expression: object, places: Iterable[str]) -> None:
    compiled = pattern(expression, "rename")
    if not any(compiled.search(where) for where in places):
        raise AdapterFileError(
            f"rename={{{compiled.pattern!r}: ...}} matches none of the layers of {path}",
            details=list(places),
            path=str(path),
        )


def _rewritten(where: str, rename: Mapping[Any, Any]) -> str:
    for expression, replacement in rename.items():
        try:
            where = pattern(expression, "rename").sub(replacement, where)
        except (re.error, TypeError, IndexError) as error:
            raise AdapterFileError(
                f"rename={{{expression!r}: {replacement!r}}} is not a replacement: {error}"
            ) from None
    return where


def _new_key(key: str, new_path: Mapping[str, str]) -> str:
    where, _, name = key.rpartition(".")
    return f"{new_path.get(where, where)}.{name}"
