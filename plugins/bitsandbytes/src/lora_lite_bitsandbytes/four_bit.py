"""Reading `Linear4bit`, and keeping it readable.

    W = code[codes] · absmax

Two 4-bit codes a byte in the order of W's rows; one scale (absmax) for `blocksize` consecutive
weights, or, with double quantisation, an 8-bit code of that scale.

A trap: on CPUs with AVX512-bf16, a forward in eval mode whose input needs no gradient packs the
layer for a faster product. It rearranges the codes and rounds the scales to bfloat16. From then on,
in training mode too, the layer gives its input no gradient, and its codes are not in the order of
W; shapes that the arrangement does not fit stop the forward.

Another: the AVX-512 kernel that turns codes into weights takes scales of other blocks where the
rows of W do not hold whole blocks. Read as one long row, W comes out right.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional
from lora_lite import LayerKindError
from torch import Tensor

# bitsandbytes' flag on a layer: whether it may pack itself.
MAY_PACK = "support_avx512bf16_for_cpu"
# Our attribute on a layer: what `keep_plain` found, for `let_pack`.
BEFORE = "_lora_lite_before"


def refuse_unfit(layer: Any) -> None:
    """Refuses a layer that cannot run, or runs with other weights than it was quantised from.

    Raises:
        LayerKindError: as above.
    """
    if _state(layer) is None:
        raise LayerKindError(
            f"{layer} is not quantised yet: its weight is still {layer.weight.dtype}, "
            "and it cannot run",
            expected="bitsandbytes quantises a layer when it is moved to its device",
            fix="Call model.to(device) first ('cpu' is a device too)",
        )
    if not _is_right(layer):
        raise LayerKindError(
            f"{layer} computes with wrong weights: the CPU kernel of this bitsandbytes mixes up "
            "the scales where in_features is not a multiple of the block size "
            f"({_state(layer).blocksize})",
            fix="Keep this layer unquantised (llm_int8_skip_modules= in transformers' "
            "BitsAndBytesConfig), or use another device",
        )


def dtype(layer: Any) -> torch.dtype:
    """What the layer computes in: as told, else as its weight was before it was quantised."""
    state = _state(layer)
    before: torch.dtype = (
        layer.weight.dtype if state is None else getattr(state, "original_dtype", state.dtype)
    )
    return layer.compute_dtype or before


def blocks(layer: Any, size: int) -> Iterator[Tensor]:
    """The rows of W from first to last, in float32, about `size` weights at a time."""
    data, state = _plain(layer)
    codes, scales = data.reshape(-1).view(torch.uint8), _scales(state)
    d_out, d_in = state.shape
    # So many rows have their scales for themselves.
    unit = state.blocksize // math.gcd(state.blocksize, d_in)
    step = unit * max(1, size // (unit * d_in))
    for start in range(0, d_out, step):
        rows = min(step, d_out - start)
        first, last = start * d_in, (start + rows) * d_in
        part_codes = codes[first // 2 : math.ceil(last / 2), None]
        part_scales = scales[first // state.blocksize : math.ceil(last / state.blocksize)]
        yield _dequantised(part_codes, part_scales, state, (1, rows * d_in)).view(rows, d_in)


def keep_plain(layer: Any) -> None:
    """Unpack the layer if it is packed, and forbid it to pack itself."""
    if hasattr(layer, MAY_PACK):
        setattr(
            layer, BEFORE, (getattr(layer, MAY_PACK), _state(layer) if _is_packed(layer) else None)
        )
        layer.weight.data, layer.weight.quant_state = _plain(layer)
        layer.quant_state = layer.weight.quant_state
        setattr(layer, MAY_PACK, False)


def let_pack(layer: Any) -> None:
    """Undo `keep_plain`."""
    if hasattr(layer, BEFORE):
        may_pack, packed = getattr(layer, BEFORE)
        delattr(layer, BEFORE)
        setattr(layer, MAY_PACK, may_pack)
        if packed is not None and layer.weight.device.type == "cpu":
            layer.weight.data, _ = functional._convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
            layer.weight.quant_state = layer.quant_state = packed


def _state(layer: Any) -> Any:
    """The scales and what else describes the codes; None before they are made."""
    on_weight = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if on_weight is None else on_weight


def _is_packed(layer: Any) -> bool:
    return getattr(_state(layer), "packing_format_for_cpu", False)


def _is_right(layer: Any) -> bool:
    """Whether the layer multiplies with the W that it was quantised from.

    It looks only where there is doubt.
    """
    data, state = _plain(layer)
    if layer.weight.device.type != "cpu" or layer.in_features % state.blocksize == 0:
        return True
    w = _dequantised(data, _scales(state), state, state.shape)
    return torch.equal(w, torch.cat(list(blocks(layer, w.numel()))))


def _plain(layer: Any) -> tuple[Tensor, Any]:
    """Codes in the order of W, and their state.

    Of a packed layer they are copies: bitsandbytes' own way back would leave the scales transposed,
    or round them a second time.
    """
    state = _state(layer)
    if not _is_packed(layer):
        return layer.weight.data, state
    state = copy.copy(state)
    state.original_nested = False
    data, state = functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def _scales(state: Any) -> Tensor:
    scales: Tensor = state.absmax
    return (
        functional.dequantize_blockwise(scales, state.state2) + state.offset
        if state.nested
        else scales
    )


def _dequantised(codes: Tensor, scales: Tensor, like: Any, shape: tuple[int, ...]) -> Tensor:
    state = copy.copy(like)
    state.absmax, state.nested, state.shape, state.dtype = (
        scales,
        False,
        torch.Size(shape),
        torch.float32,
    )
    w: Tensor = functional.dequantize_4bit(codes, state)
    return w
