"""What methods of LoRA's form share, Δy = s · B (A x): the scale s, and the random start of A.

Hu et al. 2021, arXiv:2106.09685; the scale α / √r: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lora_scale(alpha: float | None, r: int, *, rslora: bool = False) -> float:
    """The scale s = α / r, or α / √r with rslora.

    Args:
        alpha: α. None stands for α = r, so s = 1.
        r: the rank.
        rslora: whether the scale shall not shrink as r grows ("rank-stabilised").
    """
    if alpha is None:
        return 1.0
    return alpha / math.sqrt(r) if rslora else alpha / r


def uniform_start(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random matrix with entries uniform in ±1/√d_in; d_in is the last dimension of `shape`.

    It is how `nn.Linear` starts its own weight (Kaiming-uniform with a = √5), and how LoRA's
    published code starts A.
    """
    return torch.empty(*shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[-1])
