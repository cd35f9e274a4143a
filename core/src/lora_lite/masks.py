"""Which rows of a layer are tokens and which are padding, from the masks of a calibration batch.

A batch may hold `attention_mask` and, for a decoder beside an encoder, `decoder_attention_mask`.
Each becomes one bool a token, (batch, tokens), whatever its form:

    bool, integer, float of 0 and 1    True or non-zero where there is a token
    additive float                     0 where there is a token, very negative where there is none
    (batch, heads, queries, keys)      a token is a key that some query attends to
    numpy arrays and lists             as tensors
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.errors import CalibrationError

ENCODER = "attention_mask"
DECODER = "decoder_attention_mask"

# Parts of a path that say: this layer of the decoder reads the encoder's output.
CROSS_ATTENTION = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn")
KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value", "to_k", "to_v")


class Masks:
    """The masks of one batch.

    Attributes:
        encoder: (batch, tokens) bool, or None.
        decoder: likewise.
        has_encoder: whether the model has an encoder, so that the first mask is not the decoder's.
    """

    def __init__(self, batch: Any, device: torch.device, *, has_encoder: bool) -> None:
        named = batch if isinstance(batch, Mapping) else {}
        self.has_encoder = has_encoder
        self.encoder = _tokens(ENCODER, named.get(ENCODER), device)
        self.decoder = _tokens(DECODER, named.get(DECODER), device)

    def rows(self, path: str, values: Tensor) -> Tensor:
        """(rows, features), without the rows that are padding.

        Args:
            path: of the layer.
            values: (..., features), what went in or came out.

        Raises:
            CalibrationError: there is a mask, and it does not fit these values.
        """
        rows = values.detach().reshape(-1, values.shape[-1])
        mask = self._of(path)
        leading = tuple(values.shape[:-1])
        if mask is None or leading == (len(mask),):
            return rows  # no padding, or one row a sequence
        if leading in (tuple(mask.shape), (1, mask.numel()), (mask.numel(),)):
            return rows[mask.reshape(-1)]
        raise CalibrationError(
            f"the mask of a calibration batch has shape {list(mask.shape)}, and the inputs of "
            f"{path} have shape {list(values.shape)}",
            expected="A mask says of each token whether it counts",
            fix="Leave the layer out with exclude=, or give batches without padding and mask",
            layers=(path,),
        )

    def _of(self, path: str) -> Tensor | None:
        """The mask for a layer: the decoder's for its own layers, the encoder's for all others."""
        names = path.split(".")
        if "decoder" not in names:
            return self.encoder
        reads_encoder = any(name in CROSS_ATTENTION for name in names)
        if reads_encoder and names[-1] in KEYS_AND_VALUES:
            return self.encoder
        if self.decoder is None and not self.has_encoder:
            return self.encoder
        return self.decoder


def _tokens(name: str, given: Any, device: torch.device) -> Tensor | None:
    """(batch, tokens), True where there is a token."""
    if given is None:
        return None
    try:
        mask = torch.as_tensor(given).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{name} of a calibration batch cannot be read as a tensor: {error}"
        ) from None
    kept = _kept(name, mask)
    if kept.ndim > 2:
        kept = kept.flatten(1, -2).any(1)
    if kept.ndim not in (1, 2) or kept.numel() == 0:
        raise CalibrationError(
            f"{name} of a calibration batch has shape {list(mask.shape)}",
            expected="It is (batch, tokens) or (batch, heads, queries, keys)",
        )
    return kept


def _kept(name: str, mask: Tensor) -> Tensor:
    if not mask.is_floating_point() and not mask.is_complex():
        return mask != 0
    if mask.is_complex() or bool(mask.isnan().any()):
        raise CalibrationError(f"{name} of a calibration batch has values that are no numbers")
    if bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any()):
        return mask == 1
    if bool((mask <= 0).all()):
        return mask == 0  # additive: nothing is added for a token
    raise CalibrationError(
        f"{name} of a batch has values from {float(mask.min())} to {float(mask.max())}",
        expected="It is 1 for a token and 0 for none; or 0 for a token and negative for none",
    )
