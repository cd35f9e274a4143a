"""The file: safetensors with validated metadata. No pickle, no code, nothing executed.

Tensors go by `path of the layer . name of the tensor`, without the adapter's name. The metadata is
one JSON text, a `Metadata`, under the key `lora_lite`. A part of it is a digest of the whole
file, made with zeros in its own place.

`read` trusts nothing: the file's size, its header, its digest, then the metadata, then the tensors.
"""

import hashlib
import os
import stat
from collections.abc import Mapping

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from lora_lite.atomic import write_atomically
from lora_lite.errors import AdapterFileError
from lora_lite.foreign import explain
from lora_lite.metadata import ZEROS, FirstMetadata, Metadata
from lora_lite.warn import warn

FilePath = str | os.PathLike[str]
FORMAT = 2
KEY = "lora_lite"

# A header of safetensors is at most this long; the JSON of a real adapter is far below it.
LONGEST_HEADER = 100_000_000
LONGEST_METADATA = 32_000_000

# torch has arithmetic for these, so that their values can be checked.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class _Version(BaseModel):
    """The fields that say how to read the others."""

    model_config = ConfigDict(strict=True)

    format: int
    core: str = "of an unknown version"
    digest: str = ""


# --- writing


def write(path: FilePath, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write all of it or nothing. The bytes are made before anything is touched.

    Raises:
        AdapterFileError: the path cannot be written; a file that was there before is untouched.
    """
    target = _checked(path)
    contents = _own_memory(tensors)
    text = metadata.model_copy(update={"digest": ZEROS}).model_dump_json()
    data = bytearray(save(contents, {KEY: text}))
    start = data.index(ZEROS.encode())
    data[start : start + len(ZEROS)] = hashlib.sha256(data).hexdigest().encode()
    try:
        write_atomically(target, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(
            f"{_shown(path)} cannot be written: {reason}",
            expected="A file that was there before is untouched",
            path=_shown(path),
        ) from error


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU. safetensors refuses those that share their memory."""
    contents: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in used:
            own = own.clone()
        used.add(own.untyped_storage().data_ptr())
        contents[name] = own
    return contents


def dtypes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Every tensor name with its dtype, or dtypes if the layers differ: `["A float32", …]`."""
    return sorted({f"{key.rpartition('.')[2]} {_dtype_name(t)}" for key, t in tensors.items()})


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- reading


def read(path: FilePath) -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata and tensors, on the CPU.

    Raises:
        AdapterFileError: no such file, not an adapter of lora-lite, damaged, or of a newer format.
    """
    path = _checked(path)
    data = _bytes(path)
    texts = _texts(path, data)
    if KEY not in texts:
        raise _error(path, "is not an adapter of lora-lite", explain(path))
    version = _version(path, texts[KEY])
    if version.format > 1:
        _verify(path, data, version.digest)
    metadata = _metadata(path, texts[KEY], version.format)
    return metadata, _tensors(path, data)


def _bytes(path: FilePath) -> bytes:
    """All bytes of a regular file: a pipe or a device might never end."""
    try:
        if os.path.isdir(path):
            raise _error(path, "is a folder, not a file", explain(path))
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _error(path, "is not a regular file")
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterFileError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise _error(path, f"cannot be read: {reason}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for its other end, unless told not to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _texts(path: FilePath, data: bytes) -> dict[str, str]:
    """The texts in the header."""
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 0 < length <= min(len(data) - 8, LONGEST_HEADER):
        raise _error(path, "cannot be read as safetensors", explain(path))
    try:
        return _Header.model_validate_json(data[8 : 8 + length]).texts
    except (ValidationError, ValueError, RecursionError):
        raise _error(path, "has a damaged header") from None


class _Header(BaseModel):
    """The part of safetensors' header that holds texts."""

    texts: dict[str, str] = Field(default_factory=dict, alias="__metadata__")


def _version(path: FilePath, text: str) -> "_Version":
    """The file's format, 1 to `FORMAT`, and its digest."""
    if len(text) > LONGEST_METADATA:
        raise _error(path, f"has damaged metadata: {len(text):,} characters")
    try:
        version = _Version.model_validate_json(text)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"has damaged metadata: {_first_line(error)}") from None
    if version.format > FORMAT:
        raise AdapterFileError(
            f"{_shown(path)} has file format {version.format:.6g}, written by lora-lite-core "
            f"{version.core[:40]}",
            expected=f"The installed core reads formats up to {FORMAT}",
            fix="pip install --upgrade lora-lite-core",
            path=_shown(path),
        )
    if version.format < 1:
        raise _error(path, f"has damaged metadata: format {version.format:.6g}")
    return version


def _verify(path: FilePath, data: bytes, digest: str) -> None:
    """Compare the digest with what the file holds."""
    start = data.find(digest.encode())
    view = memoryview(data)
    found = hashlib.sha256(view[:start])
    found.update(ZEROS.encode())
    found.update(view[start + len(ZEROS) :])
    if found.hexdigest() != digest:
        raise _error(path, "is damaged: its contents are not what was written")


def _metadata(path: FilePath, text: str, version: int) -> Metadata:
    try:
        if version == 1:
            warn(
                f"{_shown(path)} is of file format 1, which has no digest, so that damage to it "
                "may go unnoticed",
                advice="Save the adapter again",
            )
            metadata = FirstMetadata.model_validate_json(text).upgraded()
        else:
            metadata = Metadata.model_validate_json(text)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"has damaged metadata: {_first_line(error)}") from None
    if not all(0 <= index < len(metadata.configurations) for index in metadata.sites.values()):
        raise _error(path, "has damaged metadata: a layer without a configuration")
    return metadata


def _tensors(path: FilePath, data: bytes) -> dict[str, Tensor]:
    try:
        # Copies, since the file's own memory is not aligned, and sums over it differ in the last
        # bit.
        tensors = {key: value.clone() for key, value in load(data).items()}
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _error(path, f"cannot be read as safetensors: {error}") from error
    unknown = [key for key, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if unknown:
        raise _error(path, f"has tensors of dtypes that adapters do not have: {unknown[:3]}")
    return tensors


# --- words


def _checked(path: object) -> str:
    """A path as text. A number would be taken for a file that is open already."""
    if isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str):
        return os.fspath(path)
    raise AdapterFileError(f"path={path!r} is not a path", expected="It is text or a pathlib.Path")


def _error(path: FilePath, problem: str, fix: str = "") -> AdapterFileError:
    return AdapterFileError(f"{_shown(path)} {problem}", fix=fix, path=_shown(path))


def _shown(path: FilePath) -> str:
    """A path for an error, also one that no file system knows."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _first_line(error: Exception) -> str:
    """What a validation complains about, without the value, which may be very long."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        return f"{where}: {first['msg'][:200]}" if where else str(first["msg"])[:200]
    return str(error)[:200]
