"""What a variant declares of each tensor that it puts on a site."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_lite.errors import VariantDefinitionError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a variant puts on a site.

    Attributes:
        shape: at least one dimension, all of them positive.
        trainable: whether the optimizer sees it.
        derived: it is frozen, and `Variant.derive` computes it again from the base alone, so that a
            file may leave it out.
        decay: whether weight decay applies (see `Adapter.param_groups`).
        dtype: the stored dtype. None means attach's dtype (float32) for a trainable tensor, and the
            site's for a frozen one.
        compute: the dtype to which the core casts a floating-point tensor on every read.
            "activation" is that of the layer's activations, "float32" is at least float32. Integer
            tensors are never cast.
        shared: a name for a tensor that all layers of the adapter have in common: those that give
            the same name and shape. It is kept, saved and counted once, and its random numbers
            depend on this name instead of the layer's path. Its start is that of the first layer,
            and its gradient the sum over all.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    derived: bool = False
    decay: bool = True
    dtype: torch.dtype | None = None
    compute: Literal["activation", "float32"] = "activation"
    shared: str = ""

    def __post_init__(self) -> None:
        sizes = self.shape if isinstance(self.shape, tuple | list) else ()
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise VariantDefinitionError(
                f"TensorSpec(shape={self.shape!r}) has no usable shape",
                expected="A tensor needs one or more dimensions, all of them positive integers",
            )
        if self.derived and self.trainable:
            raise VariantDefinitionError(
                "a derived tensor cannot be trainable",
                fix="Write TensorSpec(..., trainable=False, derived=True)",
            )
        if self.trainable and self.dtype is not None and not self.dtype.is_floating_point:
            raise VariantDefinitionError(
                f"a trainable tensor cannot have dtype {self.dtype}",
                fix="Give it a floating-point dtype, or trainable=False",
            )
        if self.compute not in ("activation", "float32"):
            raise VariantDefinitionError(
                f"TensorSpec(compute={self.compute!r}): compute is 'activation' or 'float32'"
            )
        if not isinstance(self.shared, str) or not (self.shared or "A").isidentifier():
            raise VariantDefinitionError(
                f"TensorSpec(shared={self.shared!r}) is not a name",
                expected="It is a Python identifier, such as 'bank'; '' keeps a tensor for each "
                "layer",
            )


CLOCK = TensorSpec((1,), trainable=False, dtype=torch.int64, shared="step")
"""How many steps of the optimizer an adapter has seen: the tensor "step" of a variant that has
`advance`. `init` starts it at 0, and the core counts."""
