"""Reading PEFT's LoRA, with rslora, patterns and DoRA.

    lora_A, lora_B                    A (r, d_in), B (d_out, r)
    lora_embedding_A, _B              likewise, of an embedding: A (r, tokens)
    lora_magnitude_vector             m = n₀ + dm, n₀ the row norms of this base
    weight, bias of modules_to_save   the variant `full`

Refused by name is what would load and be silently wrong:

- Adapters whose start rewrote the base (PiSSA, OLoRA, CorDA, LoftQ, …): they belong to that other
  base. Only starts that are known to leave it alone are read.
- Biases of adapted layers that were trained beside the adapter, unless they are those of this base.
- Whatever tensors are left over.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Site, Variant, make_variant
from pydantic import Field, PositiveInt
from torch import Tensor

from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.leftover import modules_saved, refuse_leftover
from lora_lite_peft.plain_lora import is_transposed

PARTS = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")
EMBEDDED = re.compile(r"(.+)\.lora_embedding_([AB])")
# Starts that leave the base as it is. True and False are PEFT's own two.
STARTS = (True, False, "gaussian")


class LoraSettings(Settings):
    """PEFT's LoraConfig, as far as it says what the tensors mean."""

    ignored: frozenset[str] = frozenset(
        {"eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size"}
    )

    r: PositiveInt = 8
    lora_alpha: float = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: tuple[str, ...] = ()


def read_lora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    """A folder of PEFT's type LORA.

    Raises:
        AdapterFileError: it holds something that cannot be read, or that does not fit the model.
    """
    settings = read_settings(LoraSettings, folder, config)
    _refuse_other_base(folder, settings)
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = PARTS.fullmatch(name)
        embedded = EMBEDDED.fullmatch(name)
        if match:
            part = match[2].removesuffix(".weight")
            layers.setdefault(match[1], {})[part] = tensor
        elif embedded:
            layers.setdefault(embedded[1], {})[f"lora_{embedded[2]}"] = tensor
        else:
            rest[name] = tensor
    _refuse_incomplete(folder, settings, layers)
    saved, rest = modules_saved(settings.modules_to_save, rest, base)
    refuse_leftover(folder, rest, base)
    sites = base.sites(layers)
    linear = [path for path in layers if not sites[path].reads_ids]
    _refuse_transposed(folder, settings, base, linear)
    variants = {path: _variant(folder, settings, path, layers[path]) for path in layers}
    found = {path: _tensors(sites[path], variants[path], layers[path]) for path in layers}
    full = {path: make_variant("full", {}) for path in saved}
    return ForeignAdapter({**variants, **full}, {**found, **saved})


def _refuse_other_base(folder: Path, settings: LoraSettings) -> None:
    start = settings.init_lora_weights
    if start not in STARTS:
        raise AdapterFileError(
            f"{folder} was started with init_lora_weights={start!r}",
            expected="Starts such as PiSSA, OLoRA and CorDA rewrite the base, and this model is "
            "not that base: the adapter would be silently wrong on it",
            fix="Save it again from PEFT with path_initial_model_for_weight_conversion=, which "
            "makes it an adapter of the base as it was",
            path=str(folder),
        )


def _refuse_incomplete(
    folder: Path, settings: LoraSettings, layers: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """An error for layers that lack one of their tensors, or have another rank than they should."""
    needed = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if settings.use_dora else [])]
    wrong: list[str] = []
    for path, parts in layers.items():
        missing = [part for part in needed if part not in parts]
        extra = [part for part in parts if part not in needed]
        if missing:
            wrong.append(f"{path}: without {', '.join(missing)}")
        elif extra:
            wrong.append(f"{path}: {', '.join(extra)}, though the config has no use_dora")
        elif parts["lora_A"].ndim != 2 or parts["lora_B"].ndim != 2:
            wrong.append(f"{path}: a convolution's; adapters go to linear layers here")
        else:
            rank = _pattern(settings.rank_pattern, path, settings.r)
            if len(parts["lora_A"]) != rank:
                wrong.append(f"{path}: rank {len(parts['lora_A'])}, and the config says {rank}")
    if wrong:
        raise AdapterFileError(
            f"{folder}: the tensors of {len(wrong)} layers are not what the config says",
            details=wrong,
            path=str(folder),
        )


def _refuse_transposed(folder: Path, settings: LoraSettings, base: Base, paths: list[str]) -> None:
    """An error if the config tells of weights stored the other way round than this model's."""
    if not paths:
        return
    kinds = {is_transposed(base, [path]) for path in paths}
    if kinds == {not settings.fan_in_fan_out}:
        raise AdapterFileError(
            f"{folder} has fan_in_fan_out={settings.fan_in_fan_out}, and this model's layers are "
            f"{type(base.module(paths[0])).__name__}",
            expected="The adapter was made for a model whose layers store their weights the other "
            "way round",
            path=str(folder),
        )


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """What PEFT takes for a layer: of the first pattern found at the end of its path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _variant(
    folder: Path, settings: LoraSettings, path: str, parts: Mapping[str, Tensor]
) -> Variant:
    try:
        return make_variant(
            "dora" if settings.use_dora else "lora",
            {
                "r": len(parts["lora_A"]),
                "alpha": float(_pattern(settings.alpha_pattern, path, settings.lora_alpha)),
                "rslora": settings.use_rslora,
                "dropout": settings.lora_dropout,
            },
        )
    except ValueError as error:
        raise AdapterFileError(f"{folder}: {path}: {error}", path=str(folder)) from None


@torch.no_grad()
def _tensors(site: Site, variant: Variant, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {"A": parts["lora_A"], "B": parts["lora_B"]}
    if "lora_magnitude_vector" in parts:
        n0 = variant.derive(site)["n0"]
        magnitude = parts["lora_magnitude_vector"]
        precise = torch.promote_types(magnitude.dtype, torch.float32)
        if magnitude.shape == n0.shape:  # the core says so if it is not
            dm = magnitude.double().to(n0.device) - n0.double()
            tensors["dm"] = dm.to(precise)
        else:
            tensors["dm"] = magnitude
    return tensors
