"""The file: safetensors with validated metadata, written atomically. No pickle, no code, nothing executed.

Tensors go by `site path . tensor name`, without the adapter's name. The metadata is one JSON text under the key
`lora_lite`.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from lora_lite.errors import AdapterFileError
from lora_lite.fingerprint import PROBES

FilePath = str | os.PathLike[str]
FORMAT = 1
KEY = "lora_lite"


class Metadata(BaseModel):
    """What a file says of itself.

    Attributes:
        format: of the file; a newer one is refused.
        variant, variant_format: the method's name, and the `Variant.format` that its fields and tensors follow.
        provider, core: distributions and versions that wrote the file.
        sites: the variant's fields at each site, as JSON.
        seed, scale: of the adapter.
        dtypes: of the tensors in the file, as `dtypes_of` gives them.
        derived: whether derived tensors are in the file; where they are not, `probes` verify them.
        uses_base: whether tensors were computed from the base's weights.
        fingerprint: samples of the base's weights by site.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )

    format: int = FORMAT
    variant: str
    variant_format: int
    provider: str
    core: str
    sites: dict[str, str] = Field(min_length=1)
    seed: int
    scale: float
    dtypes: list[str]
    derived: bool
    uses_base: bool
    fingerprint: dict[str, bytes]
    probes: dict[str, Annotated[list[float], Field(min_length=PROBES, max_length=PROBES)]]


def write(path: FilePath, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write all of it or nothing: a temporary file beside the target, synced, then renamed over it.

    Raises:
        AdapterFileError: the path cannot be written; a file that was there before is untouched.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with temporary.open("wb") as file:
            file.write(save(contents, {KEY: metadata.model_dump_json()}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise AdapterFileError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read(path: FilePath) -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata and tensors, on the CPU.

    Raises:
        AdapterFileError: no such file, not an adapter of lora-lite, damaged, or of a newer format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            # A clone, since the file's own memory is not aligned and sums over it differ in the last bit.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read as safetensors: {error}") from error
    if text is None:
        raise AdapterFileError(
            f"{path} is not an adapter of lora-lite: its metadata has no {KEY!r}"
        )
    try:
        loaded: Any = json.loads(text)
        version = loaded.get("format") if isinstance(loaded, dict) else None
        if isinstance(version, int) and version > FORMAT:
            newer = (
                f"{path} has file format {version}, written by lora-lite-core {loaded.get('core')}"
            )
            raise AdapterFileError(
                f"{newer}; this one reads up to {FORMAT}. pip install --upgrade lora-lite-core"
            )
        return Metadata.model_validate_json(text), tensors
    except (json.JSONDecodeError, ValidationError) as error:
        raise AdapterFileError(f"{path} has damaged metadata: {error}") from None


def dtypes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Every tensor name with its dtype, or dtypes where the sites differ, such as `["A float32", "B float32"]`."""
    return sorted(
        {
            f"{key.rpartition('.')[2]} {str(t.dtype).removeprefix('torch.')}"
            for key, t in tensors.items()
        }
    )
