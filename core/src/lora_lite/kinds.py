"""The kinds of layers that are linear in a manner of speaking: convolutions and embeddings.

1. Convolutions: W is the kernels, one in each row, and x the patches that they see.
2. Embeddings: W is the transposed table, and x the one-hot rows of the token ids.

Adapters go there only if they are asked to. `refusal` says why some of them are not read.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from lora_lite.errors import AdapterError
from lora_lite.layers import (
    Conv1D,
    LayerKind,
    Linear,
    class_name,
    has_plain_weight,
    layer_input,
    tensor_of,
)
from lora_lite.rows import Rows

# --- 1. convolutions

Convolve = Callable[..., Tensor]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS: Mapping[type[nn.Module], Convolve] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class Convolutional(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` without groups, padded with zeros if at all.

    W is (channels out, channels in · kernel size): each kernel is a row. The rows of y are its
    positions, with the channels last.
    """

    default: ClassVar[bool] = False
    forms_rows: ClassVar[bool] = False

    def matches(self, module: nn.Module) -> bool:
        return _own_class(module, CONVOLUTIONS) is not None and not refusal(module)

    def weight(self, module: nn.Module) -> Tensor:
        return tensor_of(module, "weight").flatten(1)

    def in_layout(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.reshape(tensor_of(module, "weight").shape)

    def rows_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        d_in, _ = self.shape(module)
        rows = Patches(cast(Convolution, module), layer_input(args, kwargs), d_in, y)
        return cast(Tensor, rows)

    def to_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.movedim(_channels(module, y), -1)

    def from_rows(self, module: nn.Module, rows: Tensor, y: Tensor) -> Tensor:
        return rows.movedim(-1, _channels(module, y))


class Patches(Rows):
    """The patches of a convolution's input: x Aᵀ is the convolution with A's rows as kernels."""

    def __init__(self, module: Convolution, x: Tensor, d_in: int, y: Tensor) -> None:
        super().__init__(d_in, y)
        self.module = module
        self.x = x
        self.y = y

    def times(self, a: Tensor) -> Tensor:
        """The product x Aᵀ, (..., k)."""
        module = self.module
        kernels = a.reshape(len(a), *module.weight.shape[1:])
        convolve = CONVOLUTIONS[cast(type[nn.Module], _own_class(module, CONVOLUTIONS))]
        product = convolve(self.x, kernels, None, module.stride, module.padding, module.dilation)
        return product.movedim(_channels(module, product), -1)

    def dropout(self, p: float) -> "Patches":
        """Drops entries of the convolution's input, before patches are taken of it."""
        dropped = functional.dropout(self.x, p)
        return Patches(self.module, dropped, self.shape[-1], self.y)


def _channels(module: nn.Module, y: Tensor) -> int:
    """The axis of the channels: the second, or the first if there is no batch."""
    return y.ndim - tensor_of(module, "weight").ndim + 1


# --- 2. embeddings


class Embedding(LayerKind):
    """`nn.Embedding`: y = one_hot(ids) Wᵀ, with W (dimension, number of tokens)."""

    default: ClassVar[bool] = False
    forms_rows: ClassVar[bool] = False
    reads_ids: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return _own_class(module, (nn.Embedding,)) is not None and not refusal(module)

    def weight(self, module: nn.Module) -> Tensor:
        return tensor_of(module, "weight").T

    def in_layout(self, module: nn.Module, w: Tensor) -> Tensor:
        return w.T

    def rows_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        rows = OneHot(cast(nn.Embedding, module), layer_input(args, kwargs), y)
        return cast(Tensor, rows)


class ScaledEmbedding(Embedding):
    """An embedding of transformers that multiplies what it looks up, as Gemma's and BART's do.

    The factor is a part of W here, so methods act on the rows as the model sees them.
    """

    def matches(self, module: nn.Module) -> bool:
        return is_scaled_embedding(module) and not refusal(module)

    def weight(self, module: nn.Module) -> Tensor:
        weight = tensor_of(module, "weight")
        return self._times(weight, module.embed_scale).T

    def in_layout(self, module: nn.Module, w: Tensor) -> Tensor:
        scale: Any = module.embed_scale
        return self._times(w, 1 / scale).T

    def _times(self, w: Tensor, scale: Any) -> Tensor:
        product: Tensor = w * (scale.to(w.dtype) if isinstance(scale, Tensor) else scale)
        return product

    def shape(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether a module is one of the classes of transformers whose names say so."""
    name = class_name(module)
    is_scaled = name.startswith("transformers.models.") and name.endswith("ScaledWordEmbedding")
    # T5Gemma 2 puts a parameter of its own in place of one token's row.
    return is_scaled and not hasattr(module, "eoi_embedding")


class OneHot(Rows):
    """The one-hot rows of token ids: x Aᵀ is a look-up in Aᵀ.

    Attributes:
        ids: (...), whole numbers.
    """

    def __init__(self, module: nn.Embedding, ids: Tensor, y: Tensor) -> None:
        super().__init__(module.num_embeddings, y)
        self.padding_idx = module.padding_idx
        self.ids = ids

    def times(self, a: Tensor) -> Tensor:
        """The product x Aᵀ, (..., k)."""
        # The id of the padding gets no gradient here either.
        return functional.embedding(self.ids, a.T, self.padding_idx)

    def dropout(self, p: float) -> "OneHot":
        """Not possible."""
        raise AdapterError(
            f"dropout of {p:g} was asked for at an embedding, whose input is token ids",
            expected="A part of an id cannot be dropped",
            fix="Give dropout=0 there, with overrides= or in a recipe",
        )


# --- what is not read


def refusal(module: nn.Module) -> str:
    """Why an embedding or a convolution is not read, as the end of "… is Conv2d"; "" if it is."""
    if isinstance(module, nn.Embedding):
        return _refusal_of_embedding(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _refusal_of_convolution(module)
    return ""


def _refusal_of_embedding(module: nn.Embedding) -> str:
    if type(module).forward is not nn.Embedding.forward and not is_scaled_embedding(module):
        return " with a forward of its own"
    if module.max_norm is not None:
        return f" with max_norm={module.max_norm:g}, which rewrites rows that it reads"
    if module.sparse:
        return " with sparse=True, and adapters' gradients are dense"
    if module.scale_grad_by_freq:
        return " with scale_grad_by_freq=True, which adapters would not follow"
    return "" if has_plain_weight(module) else " with a weight that is not a plain parameter"


def _refusal_of_convolution(module: Convolution) -> str:
    own_class = _own_class(module, CONVOLUTIONS)
    if own_class is None or type(module)._conv_forward is not own_class._conv_forward:  # type: ignore[attr-defined]
        return " with a forward of its own"
    if module.groups != 1:
        return f" with groups={module.groups}, so that its weight is not one matrix"
    if module.padding_mode != "zeros":
        return f" with padding_mode={module.padding_mode!r}; only 'zeros' can be read"
    return "" if has_plain_weight(module) else " with a weight that is not a plain parameter"


def _own_class(module: nn.Module, classes: Any) -> type[nn.Module] | None:
    """The one of torch's classes whose forward a module has."""
    for cls in classes:
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return cast(type[nn.Module], cls)
    return None


BUILT_IN: tuple[LayerKind, ...] = (
    Linear(),
    Conv1D(),
    Convolutional(),
    Embedding(),
    ScaledEmbedding(),
)
