"""DoRA, IA3, HRA, RoAd and DeLoRA as PEFT's own types; LoRA with its own ranks and scales.

The other types are in `write_dense`.

    here                              PEFT
    lora, eva: A, B                   LORA: lora_A, lora_B
    lora_bias: A, B, c                LORA with lora_bias: lora_B.bias
    dora: A, B, m = n₀ + dm           LORA with use_dora: lora_magnitude_vector = m
    ia3, ia3_ff: e                    IA3: ia3_l = 1 + e
    hra: U (r, d_in)                  HRA: hra_u = Uᵀ
    road: θ, α - 1                    ROAD: road_theta, road_alpha
    delora: A, B, λ - λ₀, w           DELORA: delora_A, delora_B, delora_lambda, delora_w_norm

A method without a type of its own is written as plain LoRA.
"""

from collections import Counter
from typing import Any

from lora_lite import AdapterError
from lora_lite.author import Base, Variant
from torch import Tensor

from lora_lite_peft import write_dense
from lora_lite_peft.config import common
from lora_lite_peft.files import PREFIX, Folder
from lora_lite_peft.parts import Part
from lora_lite_peft.plain_lora import (
    LORA_LIKE,
    is_transposed,
    lora_config,
    lora_tensors,
    own_factors,
    plain_folder,
)
from lora_lite_peft.types import Writer, exactly, one_of_each, refuse_scaled


def has_native_type(variant: Variant) -> bool:
    """Whether PEFT has a type of its own that computes what `variant` does, so that it can go on
    training from its values.
    """
    if variant.name == "delora":
        return _starts_as_theirs(variant)
    return variant.name in NATIVE


def native_folder(adapter: Part, base: Base) -> Folder:
    """An adapter as PEFT's own type.

    Raises:
        AdapterError: its layers need several types, or it has values that the type does not allow.
    """
    names = adapter.names
    if not names & NATIVE or not all(map(adapter.is_linear, adapter.sites)):
        if names & NATIVE - set(LORA_LIKE):
            raise AdapterError(
                "PEFT adapts embeddings and experts by LoRA alone, and the adapter has "
                f"{', '.join(sorted(names))}",
                fix="Leave native=True out",
                adapter=adapter.name,
            )
        return plain_folder(adapter, base)
    for theirs, writer in WRITERS.items():
        if names <= set(theirs):
            return writer(adapter, base)
    raise AdapterError(
        f"a folder of PEFT has one type, and the adapter has {', '.join(sorted(names))}",
        fix="Attach and save them as adapters of their own",
        adapter=adapter.name,
    )


def _lora(adapter: Part, base: Base) -> Folder:
    factors = own_factors(adapter)
    config = _lora_config(adapter, base)
    has_bias = any(each.offset is not None for each in factors.values())
    return Folder({**config, "lora_bias": has_bias}, lora_tensors(adapter, factors))


def _dora(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    refuse_scaled(adapter)
    tensors: dict[str, Tensor] = {}
    for path in adapter.sites:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = state[f"{path}.A"]
        tensors[f"{PREFIX}{path}.lora_B.weight"] = state[f"{path}.B"]
        magnitude = state[f"{path}.n0"].double() + state[f"{path}.dm"].double()
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude.to(state[f"{path}.dm"].dtype)
    return Folder({**_lora_config(adapter, base), "use_dora": True}, tensors)


def _lora_config(adapter: Part, base: Base) -> dict[str, Any]:
    """The most frequent rank and alpha, and patterns for the layers that have others."""
    fields: dict[str, Any] = dict(adapter.sites)
    one_of_each(adapter, "rslora")
    r = Counter(variant.r for variant in fields.values()).most_common(1)[0][0]
    alpha = Counter(variant.alpha for variant in fields.values()).most_common(1)[0][0]
    config = lora_config(base, list(fields), r, alpha * adapter.scale)
    dropouts = {variant.dropout for variant in fields.values()}
    return {
        **config,
        "lora_dropout": max(dropouts),
        "use_rslora": next(iter(fields.values())).rslora,
        "rank_pattern": {exactly(p): v.r for p, v in fields.items() if v.r != r},
        "alpha_pattern": {
            exactly(p): v.alpha * adapter.scale for p, v in fields.items() if v.alpha != alpha
        },
    }


def _ia3(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    tensors: dict[str, Tensor] = {}
    feed_forward: list[str] = []
    for path, variant in adapter.sites.items():
        e = state[f"{path}.e"]
        gate = (1 + adapter.scale * e.double()).to(e.dtype)
        if variant.name == "ia3_ff":
            feed_forward.append(path)
            tensors[f"{PREFIX}{path}.ia3_l"] = gate[None]
        else:
            tensors[f"{PREFIX}{path}.ia3_l"] = gate[:, None]
    paths = list(adapter.sites)
    return Folder(
        {
            **common(base, paths),
            "peft_type": "IA3",
            "feedforward_modules": feed_forward,
            "fan_in_fan_out": is_transposed(base, paths),
            "init_ia3_weights": True,
        },
        tensors,
    )


def _hra(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    refuse_scaled(adapter)
    r = one_of_each(adapter, "r")
    paths = list(adapter.sites)
    return Folder(
        {**common(base, paths), "peft_type": "HRA", "r": r, "apply_GS": False, "bias": "none"},
        {f"{PREFIX}{path}.hra_u": state[f"{path}.U"].T for path in paths},
    )


def _road(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    refuse_scaled(adapter)
    sharing, group_size = one_of_each(adapter, "sharing"), one_of_each(adapter, "group_size")
    tensors: dict[str, Tensor] = {}
    for path in adapter.sites:
        offset = state[f"{path}.alpha_offset"]
        tensors[f"{PREFIX}{path}.road_theta"] = state[f"{path}.theta"]
        tensors[f"{PREFIX}{path}.road_alpha"] = (1 + offset.double()).to(offset.dtype)
    config = {"peft_type": "ROAD", "variant": sharing, "group_size": group_size}
    return Folder({**common(base, list(adapter.sites)), **config}, tensors)


def _starts_as_theirs(variant: Any) -> bool:
    start: str = variant.start
    return start == "zero_b"


def _delora(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    if not all(map(_starts_as_theirs, adapter.sites.values())):
        return plain_folder(adapter, base)
    fields: dict[str, Any] = dict(adapter.sites)
    tensors: dict[str, Tensor] = {}
    for path, variant in fields.items():
        a, offset = state[f"{path}.A"], state[f"{path}.lambda_offset"]
        strength = adapter.scale * (variant.strength + offset.double())
        tensors[f"{PREFIX}{path}.delora_A"] = a
        tensors[f"{PREFIX}{path}.delora_B"] = state[f"{path}.B"]
        tensors[f"{PREFIX}{path}.delora_lambda"] = strength.to(offset.dtype)
        tensors[f"{PREFIX}{path}.delora_w_norm"] = state[f"{path}.w"].expand(a.shape[1])
    r = Counter(variant.r for variant in fields.values()).most_common(1)[0][0]
    first = next(iter(fields.values())).strength
    config = {
        "peft_type": "DELORA",
        "r": r,
        "delora_lambda": first,
        "bias": "none",
        "rank_pattern": {exactly(p): v.r for p, v in fields.items() if v.r != r},
        "lambda_pattern": {},
    }
    return Folder({**common(base, list(fields)), **config}, tensors)


WRITERS: dict[tuple[str, ...], Writer] = {
    LORA_LIKE: _lora,
    ("dora",): _dora,
    ("ia3", "ia3_ff"): _ia3,
    ("hra",): _hra,
    ("road",): _road,
    ("delora",): _delora,
    **write_dense.WRITERS,
}

NATIVE = frozenset(name for theirs in WRITERS for name in theirs)
"""The variants that PEFT has a type for."""
