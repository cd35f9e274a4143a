"""Rows that are never formed: the input of a layer that is linear only in a manner of speaking.

A convolution is y = x Wᵀ whose rows x are all patches of its input, and an embedding is one whose
rows are one-hot. To form them would cost far more than the layer itself. But a low-rank method asks
for x Aᵀ alone, which the layer can tell without x: it is the convolution with A as its kernel, or
a look-up in Aᵀ. So the layer's kind gives these rows to a variant in place of x.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_lite.errors import AdapterError


class Rows(ABC):
    """The rows x, (..., d_in), of a layer that does not form them.

    `linear(x, A)` and `x @ A.T` work, and `dropout(x, …)` where it means something. Any other use
    is an `AdapterError`.

    Attributes:
        shape: (..., d_in), as the rows would have it.
        dtype: that of the products.
        device: where the layer is.
    """

    def __init__(self, d_in: int, y: Tensor) -> None:
        self.shape = torch.Size((*y.shape[:-1], d_in))
        self.dtype = y.dtype
        self.device = y.device

    @abstractmethod
    def times(self, a: Tensor) -> Tensor:
        """The product x Aᵀ, (..., k), for A of shape (k, d_in)."""

    @abstractmethod
    def dropout(self, p: float) -> "Rows":
        """The rows with entries of the layer's input dropped.

        Raises:
            AdapterError: they cannot be.
        """

    def __matmul__(self, a: Tensor) -> Tensor:
        return self.times(a.T)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers torch's functions for these rows."""
        kwargs = kwargs or {}
        if function is functional.linear and isinstance(args[0], Rows):
            return _linear(*args, **kwargs)
        if function is torch.matmul and isinstance(args[0], Rows):
            return args[0].times(args[1].T)
        if function is functional.dropout:
            return _dropout(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        raise AdapterError(
            f"a variant calls {name} with the input of a layer that does not form its rows (an "
            "embedding or a convolution)",
            expected="Only linear(x, A), x @ A.T and dropout(x) are known there",
            fix="Leave such layers out with exclude=",
        )


def _linear(rows: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = rows.times(weight)
    return product if bias is None else product + bias


def _dropout(rows: Rows, p: float = 0.5, training: bool = True, **_: bool) -> Rows:
    return rows.dropout(p) if training and p > 0 else rows
