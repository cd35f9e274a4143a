"""Reading PEFT's LoRA, with rslora, patterns and DoRA.

    lora_A, lora_B                    A (r, d_in), B (d_out, r)
    lora_embedding_A, _B              likewise, of an embedding: A (r, tokens)
    lora_magnitude_vector             m = n₀ + dm, n₀ the row norms of this base
    lora_B.bias, or a trained bias    c of `lora_bias`
    weight, bias of modules_to_save   the variant `full`
    target_parameters                 `lora` on the experts of a mixture: see `read_experts`
    other biases, rows of tokens      see `beside`

Refused by name is what would load and be silently wrong:

- Adapters whose start rewrote the base (PiSSA, OLoRA, CorDA, LoftQ, …): they belong to that other
  base. Only starts that are known to leave it alone are read.
- Whatever tensors are left over.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Site, Variant, lora_scale, make_variant
from pydantic import Field, PositiveInt
from torch import Tensor

from lora_lite_peft.beside import trained_beside
from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.leftover import modules_saved, refuse_leftover
from lora_lite_peft.plain_lora import is_transposed
from lora_lite_peft.read_experts import split_experts
from lora_lite_peft.reading import pattern

PARTS = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)"
)
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
    target_parameters: str | tuple[str, ...] = ()
    trainable_token_indices: list[int] | dict[str, list[int]] = []


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
    experts, layers = split_experts(folder, config, layers, base)
    _refuse_incomplete(folder, settings, layers)
    saved, rest = modules_saved(settings.modules_to_save, rest, base)
    beside = trained_beside(folder, config, rest, layers, base)
    refuse_leftover(folder, beside.rest, base)
    layers = {**layers, **experts}
    sites = base.sites(layers)
    linear = [path for path in layers if path not in experts and not sites[path].reads_ids]
    _refuse_transposed(folder, settings, base, linear)
    variants: dict[str, Variant] = {}
    found: dict[str, Mapping[str, Tensor]] = {}
    for path, parts in layers.items():
        site, bias = sites[path], beside.biases.get(path)
        variants[path] = _variant(folder, settings, path, parts, bias is not None)
        found[path] = _tensors(site, variants[path], parts, bias)
    full = {path: make_variant("full", {}) for path in saved}
    return ForeignAdapter(
        {**variants, **full, **beside.variants}, {**found, **saved, **beside.tensors}
    )


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
    needed = ["lora_A", "lora_B"]
    needed += ["lora_magnitude_vector"] if settings.use_dora else []
    needed += ["lora_B.bias"] if settings.lora_bias else []
    wrong: list[str] = []
    for path, parts in layers.items():
        missing = [part for part in needed if part not in parts]
        extra = [part for part in parts if part not in needed]
        if missing:
            wrong.append(f"{path}: without {', '.join(missing)}")
        elif extra:
            option = "lora_bias" if extra == ["lora_B.bias"] else "use_dora"
            wrong.append(f"{path}: {', '.join(extra)}, though the config has no {option}")
        elif parts["lora_A"].ndim != 2 or parts["lora_B"].ndim != 2:
            wrong.append(f"{path}: a convolution's; adapters go to linear layers here")
        else:
            rank = pattern(settings.rank_pattern, path, settings.r)
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


def _variant(
    folder: Path, settings: LoraSettings, path: str, parts: Mapping[str, Tensor], has_bias: bool
) -> Variant:
    name = "lora_bias" if has_bias or settings.lora_bias else "lora"
    if settings.use_dora and name == "lora_bias":
        raise AdapterFileError(
            f"{folder}: {path} has DoRA and a bias of its own",
            expected="dora here has no place for a bias",
            path=str(folder),
        )
    try:
        return make_variant(
            "dora" if settings.use_dora else name,
            {
                "r": parts["lora_A"].shape[-2],
                "alpha": float(pattern(settings.alpha_pattern, path, settings.lora_alpha)),
                "rslora": settings.use_rslora,
                "dropout": settings.lora_dropout,
            },
        )
    except ValueError as error:
        raise AdapterFileError(f"{folder}: {path}: {error}", path=str(folder)) from None


@torch.no_grad()
def _tensors(
    site: Site, variant: Any, parts: Mapping[str, Tensor], bias: Tensor | None
) -> dict[str, Tensor]:
    tensors = {"A": parts["lora_A"], "B": parts["lora_B"]}
    if variant.name == "lora_bias":
        tensors["c"] = _offset(site, variant, parts.get("lora_B.bias"), bias)
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


def _offset(site: Site, variant: Any, own: Tensor | None, trained: Tensor | None) -> Tensor:
    """c: the bias of the adapter's own, and what training has added to the layer's, less its scale.

    Args:
        site: the layer.
        variant: `lora_bias`.
        own: `lora_B.bias`.
        trained: the layer's bias after training.
    """
    if trained is None:
        assert own is not None
        return own
    scale = lora_scale(variant.alpha, variant.r, rslora=variant.rslora)
    change = (trained.double() - site.bias().double().to(trained.device)) / scale
    precise = torch.promote_types(trained.dtype, torch.float32)
    return change.to(precise) if own is None else (change + own.double()).to(precise)
