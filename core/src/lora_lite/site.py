"""A layer as the author of a variant sees it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.errors import VariantContractError
from lora_lite.layers import LayerKind
from lora_lite.whole_module import WholeModule


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer's name, kind and sizes, without the layer: hooks hold it, and can be pickled."""

    path: str
    kind: LayerKind
    d_in: int
    d_out: int
    has_bias: bool


class Site:
    """One layer as a variant sees it.

    Sizes are always at hand; weight and bias are read from the layer when they are asked for. A
    delta must not read `path`: a compiler would build one graph for each layer.

    Attributes:
        d_in: the size of the last dimension of x.
        d_out: the size of the last dimension of y.
        has_bias: whether y = W x + b has a b.
        weight_was_read: whether `weight` or `matmul` was called.
    """

    __slots__ = ("_layer", "_module", "d_in", "d_out", "has_bias", "weight_was_read")

    def __init__(self, layer: LayerSpec, module: nn.Module) -> None:
        self._layer = layer
        self._module = module
        self.d_in = layer.d_in
        self.d_out = layer.d_out
        self.has_bias = layer.has_bias
        self.weight_was_read = False

    @property
    def path(self) -> str:
        """The layer's name in the model, such as `model.layers.0.mlp.down_proj`."""
        return self._layer.path

    @property
    def has_matrix(self) -> bool:
        """Whether y = W x + b. If not, the module is known by `parameters` and `output` alone.

        Only variants with `replaces_weights` see such a site.
        """
        return self._layer.kind.has_matrix

    @property
    def reads_ids(self) -> bool:
        """Whether the layer looks token ids up, and x is a `OneHot`."""
        return self._layer.kind.reads_ids

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        return self._layer.kind.dtype(self._module)

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode (for dropout)."""
        return self._module.training

    def bias(self) -> Tensor:
        """b, shape (d_out,), detached.

        Raises:
            VariantContractError: the layer has no bias; ask `has_bias` first.
        """
        bias = self._layer.kind.bias(self._module)
        if bias is None:
            raise VariantContractError(
                "site.bias() was called for a layer without a bias", fix="Ask site.has_bias first"
            )
        return bias.detach()

    def weight(self) -> Tensor:
        """W, dense, shape (d_out, d_in), detached; dequantised if the layer is quantised.

        It may share memory with the layer, and must not be written.
        """
        self.weight_was_read = True
        return self._layer.kind.weight(self._module).detach()

    def matmul(self, m: Tensor) -> Tensor:
        """M Wᵀ for M of shape (k, d_in): shape (k, d_out), without a dense W where possible."""
        self.weight_was_read = True
        return self._layer.kind.matmul(self._module, m)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of a module without a weight matrix, by name, detached.

        Raises:
            VariantContractError: it has one; ask `has_matrix` first.
        """
        own = self._whole_module().parameters(self._module)
        return {name: parameter.detach() for name, parameter in own.items()}

    def output(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """M(x; θ'): what such a module gives for x with other values of some parameters.

        Raises:
            VariantContractError: it has a weight matrix; ask `has_matrix` first.
        """
        return self._whole_module().output(self._module, x, parameters)

    def _whole_module(self) -> WholeModule:
        kind = self._layer.kind
        if not isinstance(kind, WholeModule):
            raise VariantContractError(
                "site.parameters() or site.output() was called for a layer with a weight matrix",
                fix="Ask site.has_matrix first",
            )
        return kind

    def __repr__(self) -> str:
        return f"Site({self.path!r}, d_in={self.d_in}, d_out={self.d_out}, bias={self.has_bias})"
