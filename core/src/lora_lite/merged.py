"""The weights of an adapted layer with the adapter's change added: what a plain layer would hold.

    W' = W + ΔW,        b' = b + c        for the change y' - y = ΔW x + c

ΔW is read off the variant's own deltas at the rows of an identity matrix, some at a time: W x is
then a column of W. A change of the layer's input has to go through W, which is less work by exact
low-rank factors, where there are such.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.change import LayerChange
from lora_lite.low_rank import factors_of, offset_of, random_inputs, refuse_not_affine

# Rows of the identity matrix at a time.
BLOCK = 512


@dataclass(frozen=True)
class MergedLayer:
    """What a plain linear layer would hold to do what the adapted one does.

    Attributes:
        weight: W + ΔW (d_out, d_in), in the dtype of the layer's weight.
        bias: b + c (d_out,), in the dtype of the layer's bias; None if both are 0.
    """

    weight: Tensor
    bias: Tensor | None


def merged_layer(change: LayerChange) -> MergedLayer:
    """The merged weight and bias of one layer. The layer is not touched.

    They are computed in float64 and rounded once.

    Raises:
        AdapterError: the change is not affine in x.
    """
    site = change.site
    w = site.weight()
    smaller = min(site.d_in, site.d_out)
    factors = factors_of(change, smaller // 16) if change.is_at_input else None
    delta = _dense(change, w) if factors is None else factors.B @ factors.A
    return MergedLayer((w.double() + delta).to(w.dtype), merged_bias(change))


def merged_bias(change: LayerChange) -> Tensor | None:
    """The merged bias alone: b + c, or None if both are 0."""
    site, offset = change.site, offset_of(change)
    if site.has_bias:
        bias = site.bias()
        return (bias.double() + offset).to(bias.dtype)
    return offset.to(site.dtype) if bool(offset.any()) else None


@torch.no_grad()
def _dense(change: LayerChange, w: Tensor) -> Tensor:
    """ΔW (d_out, d_in), in float64."""
    site = change.site
    w = w.double()
    offset = change(w.new_zeros(1, site.d_in))[0]
    delta = torch.empty_like(w)
    for start in range(0, site.d_in, BLOCK):
        columns = w[:, start : start + BLOCK]
        x = w.new_zeros(columns.shape[1], site.d_in)
        x[:, start : start + BLOCK].fill_diagonal_(1)
        delta[:, start : start + BLOCK] = (change(x, columns.T) - offset).T
    x = random_inputs(change, 2, torch.Generator().manual_seed(0))
    refuse_not_affine(change, x, x @ delta.T + offset)
    return delta
