"""Any change of low rank as plain LoRA, in the form that everybody reads rightly.

    y' - y = (lora_alpha / r) · (B (A x) + c)        A (r, d_in),  B (d_out, r)

    linear layers        lora_A, lora_B; lora_B.bias where a method shifts the output
    embeddings           lora_embedding_A (r, tokens), lora_embedding_B
    experts              lora_A, lora_B of all of them: see `expert_tensors`

One rank r for all layers, filled up with zeros; the scale folded into B, so that lora_alpha = r; no
patterns, no rslora. Converters exist that pass over patterns and rslora, and vLLM has one limit for
the rank.

A LoRA whose layers all have one rank and one alpha has this form already, and keeps its A and B bit
for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lora_lite import AdapterError
from lora_lite.author import Base
from lora_lite.low_rank import LowRank
from lora_lite.warn import warn
from torch import Tensor
from torch.nn.functional import pad

from lora_lite_peft.config import common, targets
from lora_lite_peft.expert_tensors import LAYOUT, expert_tensors
from lora_lite_peft.files import PREFIX, Folder
from lora_lite_peft.parts import Part

# Variants whose tensors are A and B, with the scale of LoRA.
LORA_LIKE = ("lora", "eva", "lora_bias")


@dataclass(frozen=True)
class Factors:
    """The change of one layer, y' - y = scale · (B (A x) + offset).

    Those of experts are stacked: A (experts, r, d_in), B (experts, d_out, r).
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    offset: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A, or of that of each expert."""
        return self.A.shape[-2]


def plain_folder(adapter: Part, base: Base, rank: int | None) -> Folder:
    """An adapter as plain LoRA.

    Raises:
        AdapterError: a change is of full rank, and no rank is given.
    """
    if all(is_lora_like(variant, rank) for variant in adapter.sites.values()):
        factors = own_factors(adapter)
    else:
        factors = _factors(adapter, rank)
    ranks = {each.rank for each in factors.values()}
    scales = {each.scale for each in factors.values()}
    r = max(1, *ranks)
    if len(ranks) == len(scales) == 1 and ranks == {r}:
        (scale,) = scales
        alpha = scale * r
    else:
        factors = {path: _filled(each, r) for path, each in factors.items()}
        alpha = float(r)
    has_offset = any(each.offset is not None for each in factors.values())
    if has_offset:
        warn(
            "the adapter shifts outputs by a constant, which PEFT calls lora_bias",
            advice="PEFT reads it; most servers refuse such a folder",
        )
    config = lora_config(base, list(factors), r, alpha, lora_bias=has_offset)
    if any(map(adapter.experts, adapter.sites)):
        plain = [path for path in factors if not adapter.experts(path)]
        named = [path for path in factors if adapter.experts(path)]
        config |= {
            "target_modules": targets(base, plain) if plain else [],
            "target_parameters": named,
            "peft_version": LAYOUT,
        }
    return Folder(config, lora_tensors(adapter, factors))


def lora_tensors(adapter: Part, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The factors under PEFT's names."""
    has_offset = any(each.offset is not None for each in factors.values())
    tensors: dict[str, Tensor] = {}
    for path, each in factors.items():
        if adapter.experts(path):
            tensors |= expert_tensors(adapter, path, each.A, each.B)
            continue
        name = f"{PREFIX}{path}."
        if adapter.reads_ids(path):
            tensors[f"{name}lora_embedding_A"] = each.A
            tensors[f"{name}lora_embedding_B"] = each.B
            continue
        tensors[f"{name}lora_A.weight"] = each.A
        tensors[f"{name}lora_B.weight"] = each.B
        if has_offset:
            offset = each.B.new_zeros(len(each.B)) if each.offset is None else each.offset
            tensors[f"{name}lora_B.bias"] = offset
    return tensors


def lora_config(
    base: Base, paths: list[str], r: int, alpha: float, **settings: Any
) -> dict[str, Any]:
    """PEFT's config of a LoRA."""
    return {
        **common(base, paths),
        "peft_type": "LORA",
        "r": r,
        # An integer where it is one, as PEFT itself writes it.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed(base, paths),
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        **settings,
    }


def is_transposed(base: Base, paths: list[str]) -> bool:
    """Whether all layers are GPT-2's `Conv1D`, whose weights are stored the other way round.

    Embeddings and experts do not count.
    """
    paths = [path for path in paths if type(base.module(path)).__name__ != "Embedding"]
    return bool(paths) and all(type(base.module(path)).__name__ == "Conv1D" for path in paths)


def is_lora_like(variant: Any, rank: int | None = None) -> bool:
    """Whether a variant is LoRA in all but its start, of at most this rank."""
    return variant.name in LORA_LIKE and (rank is None or variant.r <= rank)


def own_factors(adapter: Part) -> dict[str, Factors]:
    """A and B of an adapter whose variants are all LoRA in all but their start, as they are."""
    state = adapter.state_dict()
    found: dict[str, Factors] = {}
    for path, variant in adapter.sites.items():
        fields: Any = variant
        scale = fields.alpha / (math.sqrt(fields.r) if fields.rslora else fields.r)
        a, b, c = state[f"{path}.A"], state[f"{path}.B"], state.get(f"{path}.c")
        found[path] = Factors(a, b, scale * adapter.scale, c)
    return found


def _factors(adapter: Part, rank: int | None) -> dict[str, Factors]:
    try:
        found = adapter.low_rank(rank)
    except AdapterError as error:
        if not error.details:
            raise
        raise AdapterError(
            error.problem,
            details=error.details,
            expected="Plain LoRA has no place for it",
            fix="native=True writes DoRA, IA3, HRA and RoAd as PEFT's own types; "
            'format="merged" writes the whole model; rank= keeps only the largest part of the '
            "change",
            adapter=adapter.name,
            layer=error.layer,
        ) from None
    _tell_truncated({path: each.error for path, each in found.items() if each.error})
    each_alone = {path: _rounded(each) for path, each in found.items()}
    return {path: _of_layer(adapter, path, each_alone) for path in adapter.sites}


def _of_layer(adapter: Part, path: str, found: Mapping[str, Factors]) -> Factors:
    """The factors of a layer; those of experts stacked, and filled up to one rank."""
    stack = adapter.experts(path)
    if stack is None:
        return found[path]
    count = stack.count(adapter.adapter._modules[path])
    each = [found[f"{path}[{expert}]"] for expert in range(count)]
    r = max(one.rank for one in each)
    filled = [_filled(one, r) for one in each]
    return Factors(torch.stack([one.A for one in filled]), torch.stack([one.B for one in filled]))


def _tell_truncated(errors: Mapping[str, float]) -> None:
    if errors:
        worst = sorted(errors, key=errors.__getitem__, reverse=True)
        warn(
            f"the change of {len(errors)} layers was truncated",
            [f"{path}: {errors[path]:.2g} of its size is lost" for path in worst],
            "A higher rank= loses less",
        )


def _rounded(factors: LowRank) -> Factors:
    offset = None if factors.offset is None else factors.offset.float()
    return Factors(factors.A.float(), factors.B.float(), offset=offset)


def _filled(factors: Factors, r: int) -> Factors:
    """Factors of rank r and scale 1, with zeros for what is missing."""
    missing = r - factors.rank

    def scaled(tensor: Tensor) -> Tensor:
        return (tensor.double() * factors.scale).to(tensor.dtype)

    return Factors(
        A=pad(factors.A, (0, 0, 0, missing)),
        B=pad(scaled(factors.B), (0, missing)),
        offset=None if factors.offset is None else scaled(factors.offset),
    )
