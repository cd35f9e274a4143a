"""All adapters of a model at once, for the tools in which people train.

`param_groups` is what an optimizer takes. `save_all` and `restore_all` are a checkpoint: all that
training has changed, without the base. Its folder holds

    NAME.adapter.safetensors     each adapter, as `Adapter.save` writes it
    base-changes.safetensors     what else of the model trains, if anything does
    adapters.json                which files belong together, and their digests

The last file is written last. A save that was interrupted is seen, and never restored in part.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.atomic import PREFIX, write_atomically
from lora_lite.attaching import adapters
from lora_lite.base_changes import changed_tensors, live_tensors, saved_values, write_tensors
from lora_lite.errors import AdapterError, AdapterFileError, AdapterWarning
from lora_lite.fileformat import FilePath
from lora_lite.groups import Groups, Rates, parameter_groups
from lora_lite.layers import is_dtensor, overwrite
from lora_lite.metadata import Record
from lora_lite.registry import adapted_root
from lora_lite.restore import kept_on_error

SUFFIX = ".adapter.safetensors"
BASE_CHANGES = "base-changes.safetensors"
CONTENTS = "adapters.json"


class Contents(Record):
    """What a folder of `save_all` holds.

    Attributes:
        format: of the folder.
        digests: the SHA-256 of each file, by its name.
    """

    format: Literal[1] = 1
    digests: dict[str, str]


def param_groups(model: nn.Module, weight_decay: float = 0.0, *, lr: Rates | None = None) -> Groups:
    """Parameter groups for an optimizer, of all adapters of a model.

    Weight decay is kept off what must not decay. Parameters of the base that you train beside the
    adapters are not among them: add a group of your own.

    Args:
        model: with its adapters.
        weight_decay: of the tensors that may decay.
        lr: the learning rate of some tensors, by their names, such as `{"B": 16 * rate}` for LoRA+
            (Hayou et al. 2024, arXiv:2402.12354). All others have the optimizer's.

    Raises:
        AdapterError: the model has no adapter; a number is below 0; or a name that no trainable
            tensor has.
    """
    tensors = (each for adapter in _adapters(model).values() for each in adapter._tensors())
    return parameter_groups(tensors, weight_decay, lr)


def save_all(model: nn.Module, folder: FilePath) -> None:
    """Save all that training has changed: every adapter, and what else of the model trains.

    The parameters of the base that require a gradient are saved, and the running statistics of
    normalisations if they have changed. An optimizer is not. After an error the folder is as it
    was; other files in it are not touched. On a sharded model (FSDP2) every process must call this;
    rank 0 writes.

    Args:
        model: with its adapters.
        folder: made if it is not there.

    Raises:
        AdapterError: the model has no adapter; or see `Adapter.save`.
        AdapterFileError: see `Adapter.save`.
    """
    attached = _adapters(model)
    root = adapted_root(model)
    changes = changed_tensors(root)
    writes = _writes(root)
    with _replaced_together(Path(folder), writes) as new, _without_warnings_of(changes):
        for name, adapter in attached.items():
            adapter.save(new / f"{name}{SUFFIX}")
        if changes and writes:
            write_tensors(new / BASE_CHANGES, changes)


def restore_all(model: nn.Module, folder: FilePath) -> None:
    """Put back what `save_all` has saved, to go on training: all of it or nothing.

    The parameters stay the same objects, so an optimizer keeps them. On a sharded model (FSDP2)
    every process must call this, and needs the folder.

    Args:
        model: with the same adapters attached.
        folder: that `save_all` wrote.

    Raises:
        AdapterFileError: the folder is not one of `save_all`, or its files are damaged; or it holds
            other adapters than the model has, or what else trains is not the same.
        BaseMismatchError: it was saved on a base with other weights.
    """
    attached = _adapters(model)
    root = adapted_root(model)
    files = _verified(Path(folder))
    _refuse_other_adapters(folder, files, attached)
    live = live_tensors(root)
    values = saved_values(files.get(BASE_CHANGES), root, folder)
    with kept_on_error(list(attached.values()), list(live.values())):
        for name, adapter in attached.items():
            adapter.restore(files[f"{name}{SUFFIX}"])
        with torch.no_grad():
            for name, value in values.items():
                overwrite(live[name], value)


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    found = adapters(model)
    if not found:
        raise AdapterError(
            f"this {type(model).__name__} has no adapter", fix="Attach or load one first"
        )
    return found


# --- saving


def _writes(root: nn.Module) -> bool:
    """Whether this process writes: of a sharded model, only the first one does."""
    sharded = any(map(is_dtensor, root.parameters()))
    return not sharded or torch.distributed.get_rank() == 0


@contextmanager
def _replaced_together(folder: Path, writes: bool) -> Iterator[Path]:
    """A new, empty folder, whose files replace those in `folder` when the block ends.

    A process that does not write gets a folder that is not there.
    """
    if not writes:
        yield folder / "of another process"
        return
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    try:
        yield new
        digests = {file.name: _digest(file) for file in sorted(new.iterdir())}
        for name in digests:
            os.replace(new / name, folder / name)
        contents = Contents(digests=digests).model_dump_json()
        write_atomically(folder / CONTENTS, contents.encode())
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _without_warnings_of(changes: Mapping[str, Tensor]) -> Iterator[None]:
    """No warnings that an adapter's file lacks what else was trained: it is in the same folder."""
    if not changes:
        yield
        return
    with warnings.catch_warnings():
        for beginning in ("these parameters of the base", "training changed these statistics"):
            warnings.filterwarnings("ignore", f"lora-lite: {beginning}", AdapterWarning)
        yield


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- restoring


def _verified(folder: Path) -> dict[str, Path]:
    """The files that belong together, by name."""
    contents = contents_of(folder)
    files = {name: folder / name for name in contents.digests}
    wrong = [
        name
        for name, file in files.items()
        if not file.is_file() or _digest(file) != contents.digests[name]
    ]
    if wrong:
        raise AdapterFileError(
            f"{folder} is damaged, or saving into it was interrupted",
            details=[f"{name}: missing, or not what was saved" for name in wrong],
            fix="Go back to an earlier checkpoint",
            path=str(folder),
        )
    return files


def contents_of(folder: FilePath) -> Contents:
    """What a folder of `save_all` holds, its files unread.

    Raises:
        AdapterFileError: it is not such a folder.
    """
    folder = Path(folder)
    try:
        text = (folder / CONTENTS).read_text(encoding="utf-8")
        contents = Contents.model_validate_json(text)
    except OSError as error:
        raise AdapterFileError(
            f"{folder} holds no adapters: {CONTENTS} cannot be read: {error.strerror or error}",
            expected="save_all writes such folders; load reads the file of a single adapter",
            path=str(folder),
        ) from None
    except (ValidationError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{folder / CONTENTS} is damaged: {str(error)[:200]}", path=str(folder)
        ) from None
    outside = [name for name in contents.digests if name != Path(name).name]
    if outside:
        raise AdapterFileError(
            f"{folder / CONTENTS} is damaged: it names files outside of its folder",
            details=outside,
            path=str(folder),
        )
    return contents


def _refuse_other_adapters(
    folder: FilePath, files: Mapping[str, Path], attached: Mapping[str, Adapter]
) -> None:
    saved = {name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)}
    if saved != attached.keys():
        raise AdapterFileError(
            f"{folder} holds the adapters {', '.join(sorted(map(repr, saved)))}, and the model has "
            f"{', '.join(sorted(map(repr, attached)))}",
            fix="Attach the adapters under the names that they were saved with",
            path=str(folder),
        )
