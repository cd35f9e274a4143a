"""PEFT's config: what is written, and what of it must not be passed over in reading."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_lite import AdapterFileError
from lora_lite.author import Base
from pydantic import BaseModel, ConfigDict, ValidationError

# What says nothing about the outputs of the adapter.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "modules_to_save",  # its tensors are looked at
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """The part of a config that a reader understands. Everything else must be empty or harmless."""

    model_config = ConfigDict(extra="allow", frozen=True)

    # Settings that only matter for training, or that the tensors tell.
    ignored: frozenset[str] = frozenset()


def read_settings(cls: type[S], folder: Path, config: Mapping[str, Any]) -> S:
    """A config, validated.

    Raises:
        AdapterFileError: a value that is not allowed; or settings with a value that are neither
            understood nor harmless. All of them are named.
    """
    try:
        settings = cls.model_validate({k: v for k, v in config.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterFileError(
            f"{folder}: the config's {where}={first['input']!r}: {first['msg']}", path=str(folder)
        ) from None
    extra = settings.model_extra or {}
    unknown = {
        name: value
        for name, value in extra.items()
        if value and name not in HARMLESS and name not in settings.ignored
    }
    if unknown:
        raise AdapterFileError(
            f"{folder} was made with settings of PEFT that an adapter of lora-lite cannot have",
            details=[f"{name}={value!r}" for name, value in unknown.items()],
            expected="Passed over, they would make its outputs silently wrong",
            path=str(folder),
        )
    return settings


def common(base: Base, paths: Iterable[str]) -> dict[str, Any]:
    """What every config that is written has."""
    name = getattr(getattr(base.root, "config", None), "name_or_path", None) or None
    is_causal = type(base.root).__name__.endswith("ForCausalLM")
    return {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "target_modules": targets(base, list(paths)),
        "task_type": "CAUSAL_LM" if is_causal else None,
    }


def targets(base: Base, paths: list[str]) -> list[str] | str:
    """The layers' paths; as a regular expression where PEFT would take one for the end of another.

    PEFT adapts every module whose path is one of the list, or ends with a dot and one of it.
    """
    chosen = set(paths)
    others = [path for path in base.paths if path not in chosen]
    if any(other.endswith(tuple(f".{path}" for path in paths)) for other in others):
        return "|".join(path.replace(".", r"\.") for path in paths)
    return paths
