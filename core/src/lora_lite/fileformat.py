"""The file: safetensors with validated metadata, written atomically. No pickle, no code, nothing executed.

Tensors go by `site path . tensor name`, without the adapter's name. The metadata is one JSON text under the key
`lora_lite`.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor

from lora_lite.errors import AdapterFileError
from lora_lite.fingerprint import PROBES

FORMAT = 1
KEY = "lora_lite"


class Metadata(BaseModel):
    """What a file says of itself.

    Attributes:
        format: of the file; a newer one is refused.
        variant, variant_format: the method's name, and the `Variant.format` that its fields and tensors follow.
        provider, core: distributions and versions that wrote the file.
        configurations, sites: the variants' fields as JSON, and for each site which of them it has.
        seed, scale: of the adapter.
        dtypes: of the tensors in the file, by tensor name: one, or several where the sites differ.
        derived: whether derived tensors are in the file; where they are not, `probes` verify them.
        uses_base: whether tensors were computed from the base's weights.
        fingerprint: samples of the base's weights by site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    format: int = FORMAT
    variant: str
    variant_format: int
    provider: str
    core: str
    configurations: list[str]
    sites: dict[str, int]
    seed: int
    scale: float
    dtypes: dict[str, list[str]]
    derived: bool
    uses_base: bool
    fingerprint: dict[str, str]
    probes: dict[str, Annotated[list[float], Field(min_length=PROBES, max_length=PROBES)]]

    @model_validator(mode="after")
    def _consistent(self) -> Metadata:
        if not self.sites or not all(0 <= index < len(self.configurations) for index in self.sites.values()):
            raise ValueError("a site refers to a configuration that is not there, or no site is named")
        for text in self.fingerprint.values():
            base64.b64decode(text, validate=True)
        return self


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write all of it or nothing: a temporary file beside the target, synced, then renamed over it.

    Raises:
        AdapterFileError: the path cannot be written; a file that was there before is untouched.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        temporary.write_bytes(save(contents, {KEY: metadata.model_dump_json()}))
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except OSError as error:
        raise AdapterFileError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # so that the rename survives a power cut, where the system can: the file is in place already
        _sync(target.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata and tensors, on the CPU.

    Raises:
        AdapterFileError: no such file, not an adapter of lora-lite, damaged, or of a newer format.
    """
    with _opened(path) as (file, metadata):
        # A clone, since the file's own memory is not aligned and sums over it differ in the last bit.
        return metadata, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def read_metadata(path: str | os.PathLike[str]) -> tuple[Metadata, dict[str, tuple[str, list[int]]]]:
    """Metadata, and dtype and shape of every tensor, without reading the tensors.

    Raises:
        AdapterFileError: as `read`.
    """
    with _opened(path) as (file, metadata):
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return metadata, {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Metadata]]:
    """The open file and its validated metadata; what goes wrong while reading is an `AdapterFileError`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file, _parsed(path, file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read as safetensors: {error}") from error


def _parsed(path: str | os.PathLike[str], raw: Mapping[str, str]) -> Metadata:
    if KEY not in raw:
        raise AdapterFileError(f"{path} is not an adapter of lora-lite: its metadata has no {KEY!r}")
    try:
        loaded: Any = json.loads(raw[KEY])
        version = loaded.get("format") if isinstance(loaded, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise AdapterFileError(
                f"{path} has file format {version}, written by lora-lite-core {loaded.get('core')}; this one reads up to "
                f"{FORMAT}. pip install --upgrade lora-lite-core"
            )
        return Metadata.model_validate_json(raw[KEY])
    except (json.JSONDecodeError, ValidationError) as error:
        raise AdapterFileError(f"{path} has damaged metadata: {error}") from None


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The dtypes of each tensor name over all sites, such as `{"A": ["float32"]}`."""
    found: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        found.setdefault(key.rpartition(".")[2], set()).add(dtype_name(tensor.dtype))
    return {name: sorted(dtypes) for name, dtypes in found.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
