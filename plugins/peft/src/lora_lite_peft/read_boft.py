"""Reading PEFT's BOFT.

here              PEFT
boft: Q (m, d_in / b, b (b - 1) / 2)   boft_R (m, d_in / b, b, b), of which (R - Rᵀ) / 2 counts
boft: s (d_out,)                       boft_s - 1, (d_out, 1)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Variant
from torch import Tensor

from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.reading import Layers, Reader, layers_of, made, refuse_dropout


class BoftSettings(Settings):
    """PEFT's BOFTConfig. The sizes of the blocks and the number of factors, the tensors tell."""

    ignored: frozenset[str] = frozenset(
        {
            "boft_block_num",
            "boft_block_size",
            "boft_n_butterfly_factor",
            "fan_in_fan_out",
            "init_weights",
        }
    )

    bias: Literal["none", "all", "boft_only"] = "none"
    boft_dropout: float = 0.0


def read_boft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(BoftSettings, folder, config)
    refuse_dropout(folder, boft_dropout=settings.boft_dropout)
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, parts in layers_of(folder, tensors, base, ("boft_R", "boft_s")).items():
        blocks = parts["boft_R"]
        factors, _, b, _ = blocks.shape
        if b % 2:
            raise AdapterFileError(
                f"{folder} has blocks of {b} inputs at {path}",
                expected="The blocks of boft have an even number of them",
                path=str(folder),
            )
        row, column = torch.triu_indices(b, b, 1)
        skew = (blocks - blocks.mT) / 2
        variants[path] = made(folder, path, "boft", {"block_size": b, "factors": factors})
        found[path] = {"Q": skew[..., row, column], "s": parts["boft_s"][:, 0] - 1}
    return ForeignAdapter(variants, found)


READERS: dict[str, Reader] = {"BOFT": read_boft}
