"""The suite for layer kinds. What spans packages is in the repository's tests/test_quantised.py."""

from functools import partial

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from lora_lite.testing import LayerKindTests
from lora_lite_bitsandbytes import BitsAndBytes
from torch import nn


def four_bit(
    bias: bool, quant_type: str, double: bool, dtype: torch.dtype = torch.float32
) -> nn.Module:
    layer = Linear4bit(64, 128, bias=bias, quant_type=quant_type, compress_statistics=double)
    return layer.to(dtype).to("cpu")


def eight_bit(bias: bool, threshold: float) -> nn.Module:
    return Linear8bitLt(12, 20, bias=bias, has_fp16_weights=False, threshold=threshold).to("cpu")


class TestFourBit(LayerKindTests):
    """Where a CPU packs the layers, they compute in bfloat16 unless an adapter is attached."""

    kind = BitsAndBytes
    layers = (
        partial(four_bit, True, "nf4", True),
        partial(four_bit, False, "nf4", False),
        partial(four_bit, False, "fp4", False),
    )
    tolerance = 0.01


class TestEightBit(LayerKindTests):
    """In eval mode the input is rounded to 8 bits too."""

    kind = BitsAndBytes
    layers = (partial(eight_bit, True, 0.0), partial(eight_bit, False, 6.0))
    tolerance = 0.02
