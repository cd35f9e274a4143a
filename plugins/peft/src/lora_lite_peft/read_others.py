"""Reading PEFT's IA3, HRA, RoAd, DeLoRA, LayerNorm tuning and trainable tokens.

`native` has the table of what the tensors of the first four are. The last two are `full` and
`tokens`, which have what PEFT has: the new parameters themselves.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Variant, make_variant
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from lora_lite_peft.beside import trained_beside
from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.leftover import refuse_leftover
from lora_lite_peft.reading import Layers, Reader, layers_of, less_one, made, refuse_dropout


class IA3Settings(Settings):
    """PEFT's IA3Config. Which layers are feed-forward, the shapes of their gates tell as well."""

    ignored: frozenset[str] = frozenset({"fan_in_fan_out", "init_ia3_weights"})

    feedforward_modules: list[str] | str = []


class HRASettings(Settings):
    """PEFT's HRAConfig."""

    ignored: frozenset[str] = frozenset({"init_weights"})

    r: PositiveInt = 8
    bias: Literal["none", "all", "hra_only"] = "none"


class RoadSettings(Settings):
    """PEFT's RoadConfig."""

    ignored: frozenset[str] = frozenset({"init_weights"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: PositiveInt = 64


class DeloraSettings(Settings):
    """PEFT's DeloraConfig."""

    ignored: frozenset[str] = frozenset({"init_weights"})

    r: PositiveInt = 8
    delora_lambda: PositiveFloat = 15.0
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    rank_pattern: dict[str, PositiveInt] = {}
    lambda_pattern: dict[str, PositiveFloat] = {}


def read_ia3(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(IA3Settings, folder, config)
    variants: dict[str, Variant] = {}
    gates: Layers = {}
    for path, parts in layers_of(folder, tensors, base, ("ia3_l",)).items():
        gate = parts["ia3_l"]
        is_feed_forward = _is_feed_forward(settings.feedforward_modules, path)
        if gate.ndim != 2 or gate.shape[0 if is_feed_forward else 1] != 1:
            raise AdapterFileError(
                f"{folder}: {path} has a gate of shape {list(gate.shape)}",
                expected="A gate on inputs is (1, d_in), where feedforward_modules names the "
                "layer; one on outputs is (d_out, 1)",
                path=str(folder),
                tensors=(f"{path}.ia3_l",),
            )
        variants[path] = make_variant("ia3_ff" if is_feed_forward else "ia3", {})
        gates[path] = {"e": less_one(gate.flatten())}
    return ForeignAdapter(variants, gates)


def _is_feed_forward(modules: list[str] | str, path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path.endswith(name) for name in modules)


def read_hra(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    read_settings(HRASettings, folder, config)  # apply_GS, if set, is not understood
    variants: dict[str, Variant] = {}
    rows: Layers = {}
    for path, parts in layers_of(folder, tensors, base, ("hra_u",)).items():
        u = parts["hra_u"].T
        if len(u) % 2:
            u = torch.cat([u, torch.zeros_like(u[:1])])  # a row of zeros reflects nothing
        variants[path] = made(folder, path, "hra", {"r": len(u)})
        rows[path] = {"U": u}
    return ForeignAdapter(variants, rows)


def read_road(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(RoadSettings, folder, config)
    fields = {"sharing": settings.variant, "group_size": settings.group_size}
    layers = layers_of(folder, tensors, base, ("road_theta", "road_alpha"))
    return ForeignAdapter(
        {path: made(folder, path, "road", fields) for path in layers},
        {
            path: {"theta": parts["road_theta"], "alpha_offset": less_one(parts["road_alpha"])}
            for path, parts in layers.items()
        },
    )


def read_delora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(DeloraSettings, folder, config)
    refuse_dropout(folder, module_dropout=settings.module_dropout)
    parts = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, given in layers_of(folder, tensors, base, parts).items():
        a, b, strength, w = (given[part] for part in parts)
        start = settings.delora_lambda
        variants[path] = made(
            folder, path, "delora", {"r": len(a), "strength": start, "start": "zero_b"}
        )
        offset = (strength.double() - start).to(strength.dtype)
        found[path] = {"A": a, "B": b, "lambda_offset": offset, "w": w}
    return ForeignAdapter(variants, found)


def read_ln_tuning(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    read_settings(Settings, folder, config)
    found: Layers = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, middle, parameter = name.partition(".ln_tuning_layers.")
        if middle:
            found.setdefault(path, {})[parameter] = tensor
        else:
            rest[name] = tensor
    refuse_leftover(folder, rest, base)
    return ForeignAdapter({path: make_variant("full", {}) for path in found}, found)


class TokensSettings(Settings):
    """PEFT's TrainableTokensConfig."""

    ignored: frozenset[str] = frozenset({"init_weights"})

    token_indices: list[int] = []


def read_tokens(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    read_settings(TokensSettings, folder, config)
    beside = trained_beside(folder, config, tensors, {}, base)
    refuse_leftover(folder, beside.rest, base)
    return ForeignAdapter(beside.variants, beside.tensors)


READERS: dict[str, Reader] = {
    "IA3": read_ia3,
    "HRA": read_hra,
    "ROAD": read_road,
    "DELORA": read_delora,
    "LN_TUNING": read_ln_tuning,
    "TRAINABLE_TOKENS": read_tokens,
}
