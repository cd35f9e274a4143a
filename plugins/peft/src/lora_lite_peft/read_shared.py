"""Reading PEFT's VeRA, VB-LoRA, RandLoRA and AdaLoRA.

here                       PEFT
vera: A, B                 vera_A, vera_B of the whole model, cut to the layer
      d, b                 vera_lambda_d, vera_lambda_b
vb_lora: bank              vblora_vector_bank of the whole model
         logits            vblora_logits_A, vblora_logits_B
randlora: A, B             randlora_A, randlora_B of the whole model, cut to the layer
          lambda, gamma    randlora_lambda, randlora_gamma
adalora: P, Lambda, Q      lora_B, lora_E, lora_A
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Variant
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.files import OF_THE_MODEL
from lora_lite_peft.reading import Layers, Reader, layers_of, made, refuse_dropout

# What PEFT adds to the rank by which it divides.
EPSILON = 1e-5


class VeraSettings(Settings):
    """PEFT's VeraConfig. The random matrices are in the file, whatever key they are drawn by."""

    ignored: frozenset[str] = frozenset(
        {"fan_in_fan_out", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"}
    )

    r: PositiveInt = 256
    d_initial: PositiveFloat = 0.1
    bias: Literal["none", "all", "vera_only"] = "none"


class VBLoRASettings(Settings):
    """PEFT's VBLoRAConfig."""

    ignored: frozenset[str] = frozenset(
        {"fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "vblora_dropout"}
    )

    r: PositiveInt = 4
    num_vectors: PositiveInt = 256
    vector_length: PositiveInt = 256
    topk: PositiveInt = 2
    bias: Literal["none", "all", "vblora_only"] = "none"


class RandLoraSettings(Settings):
    """PEFT's RandLoraConfig. How the bases were drawn, the file tells."""

    ignored: frozenset[str] = frozenset(
        {
            "fan_in_fan_out",
            "init_weights",
            "projection_prng_key",
            "randlora_dropout",
            "save_projection",
            "sparse",
            "very_sparse",
        }
    )

    r: PositiveInt = 32
    randlora_alpha: PositiveFloat = 640.0
    bias: Literal["none", "all", "randlora_only"] = "none"


class AdaLoraSettings(Settings):
    """PEFT's AdaLoraConfig. The schedule is over, or begins anew. Ranks, the tensors tell."""

    ignored: frozenset[str] = frozenset(
        {
            "beta1",
            "beta2",
            "deltaT",
            "fan_in_fan_out",
            "init_r",
            "orth_reg_weight",
            "qalora_group_size",
            "r",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        }
    )

    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    init_lora_weights: Literal[True] = True
    bias: Literal["none", "all", "lora_only"] = "none"


def read_vera(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(VeraSettings, folder, config)
    (a, b), rest = _of_the_model(folder, tensors, ("vera_A", "vera_B"))
    layers = layers_of(folder, rest, base, ("vera_lambda_d", "vera_lambda_b"))
    sites = base.sites(layers)
    fields = {"r": settings.r, "d_initial": settings.d_initial}
    found = {
        path: {
            "A": a[:, : sites[path].d_in],
            "B": b[: sites[path].d_out],
            "d": given["vera_lambda_d"],
            "b": given["vera_lambda_b"],
        }
        for path, given in layers.items()
    }
    return ForeignAdapter({path: made(folder, path, "vera", fields) for path in layers}, found)


def read_vb_lora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(VBLoRASettings, folder, config)
    (bank,), rest = _of_the_model(folder, tensors, ("vblora_vector_bank",))
    layers = layers_of(folder, rest, base, ("vblora_logits_A", "vblora_logits_B"))
    fields = {
        "r": settings.r,
        "vectors": settings.num_vectors,
        "length": settings.vector_length,
        "k": settings.topk,
    }
    found = {
        path: {
            "bank": bank,
            "logits_A": given["vblora_logits_A"],
            "logits_B": given["vblora_logits_B"],
        }
        for path, given in layers.items()
    }
    return ForeignAdapter({path: made(folder, path, "vb_lora", fields) for path in layers}, found)


def read_randlora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(RandLoraSettings, folder, config)
    (a, b), rest = _of_the_model(folder, tensors, ("randlora_A", "randlora_B"))
    own = ("randlora_lambda", "randlora_gamma")
    # PEFT repeats the bases of the model at every layer.
    layers = layers_of(folder, rest, base, (*own, "randlora_A", "randlora_B"), needed=own)
    sites = base.sites(layers)
    fields = {"r": settings.r, "alpha": settings.randlora_alpha}
    found: Layers = {}
    for path, given in layers.items():
        small, large = sorted((sites[path].d_in, sites[path].d_out))
        bases = given["randlora_lambda"].shape[-1]
        # PEFT's columns, in its order, go with the rows of A in ours.
        columns = b[:large, :bases].flatten(1)
        found[path] = {
            "A": a[:, 0, :small],
            "B": columns.view(large, settings.r, bases),
            "lambda": given["randlora_lambda"],
            "gamma": given["randlora_gamma"],
        }
    variants = {path: made(folder, path, "randlora", fields) for path in layers}
    return ForeignAdapter(variants, found)


def read_adalora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(AdaLoraSettings, folder, config)
    refuse_dropout(folder, lora_dropout=settings.lora_dropout)
    layers = layers_of(folder, tensors, base, ("lora_A", "lora_B", "lora_E"))
    sites = base.sites(layers)
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, given in layers.items():
        r = len(given["lora_A"])
        alpha = settings.lora_alpha if settings.lora_alpha > 0 else float(r)
        fields = {"r": r, "alpha": alpha * r / (r + EPSILON)}
        variants[path] = variant = made(folder, path, "adalora", fields)
        specs = variant.tensors(sites[path])
        own = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        values = given["lora_E"].flatten()
        own |= {"P": given["lora_B"], "Lambda": values, "Q": given["lora_A"], "kept": values != 0}
        found[path] = own
    return ForeignAdapter(variants, found)


def _of_the_model(
    folder: Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tensors that PEFT keeps once for the model, and the others.

    Raises:
        AdapterFileError: one is missing.
    """
    missing = [name for name in names if OF_THE_MODEL + name not in tensors]
    if missing:
        raise AdapterFileError(
            f"{folder} is without {', '.join(missing)}",
            expected="PEFT leaves them out with save_projection=False, and would draw them again",
            fix="Load it with PEFT, set save_projection=True in its config, and save it again",
            path=str(folder),
            tensors=missing,
        )
    keys = [OF_THE_MODEL + name for name in names]
    rest = {name: tensor for name, tensor in tensors.items() if name not in keys}
    return [tensors[key] for key in keys], rest


READERS: dict[str, Reader] = {
    "VERA": read_vera,
    "VBLORA": read_vb_lora,
    "RANDLORA": read_randlora,
    "ADALORA": read_adalora,
}
