"""The two files of a folder of PEFT."""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from lora_lite import AdapterFileError
from safetensors.torch import load, save
from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# What PEFT puts before the path of a module in the names of its tensors.
PREFIX = "base_model.model."
# And before the names of those that it keeps once for the model.
OF_THE_MODEL = "base_model."
SHARED = ("vera_A", "vera_B", "vblora_vector_bank", "randlora_A", "randlora_B")


@dataclass(frozen=True)
class Folder:
    """What a folder is to hold.

    Attributes:
        config: the contents of `adapter_config.json`.
        tensors: by PEFT's names.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_folder(path: Path, folder: Folder) -> None:
    """Write both files, the config last: without it nobody takes the folder for an adapter.

    If they cannot be written, what was in the folder is untouched, and a folder that was made for
    them is removed again.

    Raises:
        AdapterFileError: they cannot be written.
    """
    config = json.dumps(folder.config, indent=2, sort_keys=True).encode()
    contents = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in folder.tensors.items()
    }
    tensors = save(contents, {"format": "pt"})
    is_new = not path.exists()
    unfinished: list[Path] = []
    try:
        path.mkdir(parents=True, exist_ok=True)
        for data in (tensors, config):  # both are on the disk before anything is replaced
            unfinished.append(path / f".{secrets.token_hex(8)}.tmp")
            _write(unfinished[-1], data)
        (path / CONFIG).unlink(missing_ok=True)
        os.replace(unfinished[0], path / TENSORS)
        os.replace(unfinished[1], path / CONFIG)
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be written: {error.strerror or error}", path=str(path)
        ) from error
    finally:
        with suppress(OSError):
            for file in unfinished:
                file.unlink(missing_ok=True)
            if is_new and not any(path.iterdir()):
                path.rmdir()


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def folder_of(path: Path) -> Path:
    """The folder, from its own path or that of one of its files."""
    return path if path.is_dir() else path.parent


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder.

    Raises:
        AdapterFileError: there is none, or it is not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterFileError(
            f"{folder} has no {CONFIG}",
            expected="Without it nobody knows the scale of the adapter",
            fix="Copy it from where the adapter was trained",
            path=str(folder),
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}", path=str(file)) from None
    if not isinstance(config, dict):
        raise AdapterFileError(f"{file} does not hold a JSON object", path=str(file))
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, by their names without PEFT's prefix.

    Raises:
        AdapterFileError: there are none that can be read, or names without the prefix.
    """
    file = folder / TENSORS
    if not file.is_file():
        pickle = f", but {PICKLE}, a pickle, which is never read" if _has_pickle(folder) else ""
        raise AdapterFileError(
            f"{folder} has no {TENSORS}{pickle}",
            fix="Save it with safetensors: PeftModel.from_pretrained(...).save_pretrained(folder)"
            if pickle
            else "Copy it from where the adapter was trained",
            path=str(folder),
        )
    try:
        # Copies, since the file's own memory is not aligned.
        tensors = {name: tensor.clone() for name, tensor in load(file.read_bytes()).items()}
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}", path=str(file)) from None
    shared = {OF_THE_MODEL + name for name in SHARED}
    strange = [name for name in tensors if not name.startswith(PREFIX) and name not in shared]
    if strange:
        raise AdapterFileError(
            f"{file} has {len(strange)} tensors whose names are not those of a PeftModel",
            details=strange,
            expected=f"They begin with {PREFIX!r}",
            path=str(file),
            tensors=strange,
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _has_pickle(folder: Path) -> bool:
    return (folder / PICKLE).is_file()
