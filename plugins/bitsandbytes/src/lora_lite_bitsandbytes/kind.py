"""The layer kind: bitsandbytes' quantised linear layers, as the core asks for them.

W is what a layer's codes stand for, in float32. It is read in blocks of rows, so a product with it
needs no dense copy, and a dense copy needs no second one.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from lora_lite import LayerKind
from torch import Tensor, nn

from lora_lite_bitsandbytes import eight_bit, four_bit

# Weights that are dense at one time, but where all of W is asked for.
BLOCK = 2**20


class BitsAndBytes(LayerKind):
    """`Linear4bit` (nf4 and fp4, double quantisation or not) and `Linear8bitLt`.

    Also their subclasses that keep their forward. Refused with a `LayerKindError` are

    - a layer that is still to be quantised: as it is, a `Linear4bit` cannot run, and the first
      forward of a `Linear8bitLt` would change its weight (`plan` may have it on the meta device);
    - a `Linear4bit` of a shape that the CPU's kernel gets wrong.
    """

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward in (Linear4bit.forward, Linear8bitLt.forward)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        if module.weight.device.type != "meta":
            _format(module).refuse_unfit(module)
        return module.in_features, module.out_features

    def weight(self, module: nn.Module) -> Tensor:
        assert isinstance(module, nn.Linear)
        w = torch.empty(
            module.out_features,
            module.in_features,
            dtype=torch.float32,
            device=module.weight.device,
        )
        start = 0
        for rows in _blocks(module):
            w[start : start + len(rows)] = rows
            start += len(rows)
        return w

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What a 4-bit layer is told to compute in, else what it was quantised from.

        An 8-bit layer computes in the dtype of its input; float32 is what its codes and their
        scales give.
        """
        return four_bit.dtype(module) if isinstance(module, Linear4bit) else torch.float32

    def matmul(self, module: nn.Module, m: Tensor) -> Tensor:
        """M Wᵀ, computed in float32 at least, without a dense W."""
        precise = m.to(torch.promote_types(m.dtype, torch.float32))
        return torch.cat(
            [precise @ rows.to(precise.dtype).T for rows in _blocks(module)], dim=1
        ).to(m.dtype)

    def enter(self, module: nn.Module) -> None:
        if isinstance(module, Linear4bit):
            four_bit.keep_plain(module)

    def exit(self, module: nn.Module) -> None:
        if isinstance(module, Linear4bit):
            four_bit.let_pack(module)


def _format(module: nn.Module) -> ModuleType:
    return four_bit if isinstance(module, Linear4bit) else eight_bit


def _blocks(module: nn.Module) -> Iterable[Tensor]:
    """The rows of W from first to last, in float32, some at a time."""
    blocks: Iterable[Tensor] = _format(module).blocks(module, BLOCK)
    return blocks
