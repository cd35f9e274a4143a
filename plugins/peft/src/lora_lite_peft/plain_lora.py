"""Any change of low rank as plain LoRA, in the form that everybody reads rightly.

    y' - y = (lora_alpha / r) · B (A x)        A (r, d_in),  B (d_out, r)

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

from lora_lite import Adapter, AdapterError
from lora_lite.author import Base
from lora_lite.warn import warn
from torch import Tensor
from torch.nn.functional import pad

from lora_lite_peft.config import common
from lora_lite_peft.files import PREFIX, Folder

# Variants whose tensors are A and B, with the scale of LoRA.
LORA_LIKE = ("lora", "eva")


@dataclass(frozen=True)
class Factors:
    """The change of one layer, y' - y = scale · B (A x) + offset."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    offset: Tensor | None = None


def plain_folder(adapter: Adapter, base: Base, rank: int | None) -> Folder:
    """An adapter as plain LoRA.

    Raises:
        AdapterError: a change is of full rank, and no rank is given.
    """
    if all(is_lora_like(variant, rank) for variant in adapter.sites.values()):
        factors = own_factors(adapter)
    else:
        factors = _factors(adapter, rank)
    ranks = {len(each.A) for each in factors.values()}
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
    tensors: dict[str, Tensor] = {}
    for path, each in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = each.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = each.B
        if has_offset:
            offset = each.B.new_zeros(len(each.B)) if each.offset is None else each.offset
            tensors[f"{PREFIX}{path}.lora_B.bias"] = offset
    return Folder(lora_config(base, list(factors), r, alpha, lora_bias=has_offset), tensors)


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
    """Whether all layers are GPT-2's `Conv1D`, whose weights are stored the other way round."""
    return all(type(base.module(path)).__name__ == "Conv1D" for path in paths)


def is_lora_like(variant: Any, rank: int | None = None) -> bool:
    """Whether a variant is LoRA in all but its start, of at most this rank."""
    return variant.name in LORA_LIKE and (rank is None or variant.r <= rank)


def own_factors(adapter: Adapter) -> dict[str, Factors]:
    """A and B of an adapter whose variants are all LoRA in all but their start, as they are."""
    state = adapter.state_dict()
    found: dict[str, Factors] = {}
    for path, variant in adapter.sites.items():
        fields: Any = variant
        scale = fields.alpha / (math.sqrt(fields.r) if fields.rslora else fields.r)
        found[path] = Factors(state[f"{path}.A"], state[f"{path}.B"], scale * adapter.scale)
    return found


def _factors(adapter: Adapter, rank: int | None) -> dict[str, Factors]:
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
    factors = {path: Factors(e.A, e.B, offset=e.offset) for path, e in found.items()}
    return {path: _rounded(each) for path, each in factors.items()}


def _tell_truncated(errors: Mapping[str, float]) -> None:
    if errors:
        worst = sorted(errors, key=errors.__getitem__, reverse=True)
        warn(
            f"the change of {len(errors)} layers was truncated",
            [f"{path}: {errors[path]:.2g} of its size is lost" for path in worst],
            "A higher rank= loses less",
        )


def _rounded(factors: Factors) -> Factors:
    offset = None if factors.offset is None else factors.offset.float()
    return Factors(factors.A.float(), factors.B.float(), factors.scale, offset)


def _filled(factors: Factors, r: int) -> Factors:
    """Factors of rank r and scale 1, with zeros for what is missing."""
    missing = r - len(factors.A)
    b = (factors.B.double() * factors.scale).to(factors.B.dtype)
    return Factors(
        A=pad(factors.A, (0, 0, 0, missing)), B=pad(b, (0, missing)), offset=factors.offset
    )
