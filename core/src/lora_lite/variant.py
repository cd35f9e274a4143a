"""The contract: what a variant is, what it puts on a layer, and what it is told about that layer.

A variant is a frozen pydantic model. Its fields are the method's hyperparameters, its methods the lifecycle:

    calibrate      observe, specialize
    init           tensors, derive, init
    forward delta  prepare, delta_input, delta_output         x' = x + s Δx,   y' = (W x' + b) + s Δy
    state dict     state_dict, load_state_dict

Everything but `project` is pure: it reads its arguments and returns tensors. The core places, names, casts, registers and
saves them, and never writes a base weight.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lora_lite.errors import VariantDefinitionError
from lora_lite.hookspecs import hookimpl
from lora_lite.layers import LayerKind

Identity = Literal["exact", "rounding", "none"]
Rng = Callable[[str], torch.Generator]
Tensors = Mapping[str, Tensor]

ATTACH_WORDS = frozenset(
    {"name", "targets", "exclude", "layers", "overrides", "calibration", "dtype", "seed"}
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a variant puts on a site.

    Attributes:
        shape: at least one dimension.
        trainable: whether the optimizer sees it.
        derived: frozen, and given again by `Variant.derive` from the base alone, so a file may leave it out.
        decay: whether weight decay applies (see `Adapter.param_groups`).
        dtype: the stored dtype. None means attach's dtype (float32) if trainable, the site's if frozen.
        compute: the dtype the core casts to on every read. "activation" is that of the layer's activations, "float32" is
            at least float32 (float64 stays float64).
    """

    shape: tuple[int, ...]
    trainable: bool = True
    derived: bool = False
    decay: bool = True
    dtype: torch.dtype | None = None
    compute: Literal["activation", "float32"] = "activation"

    def __post_init__(self) -> None:
        if not self.shape or any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise VariantDefinitionError(
                f"a TensorSpec needs one or more positive dimensions, not shape={self.shape}"
            )
        if self.derived and self.trainable:
            raise VariantDefinitionError(
                "a derived tensor is frozen: write TensorSpec(..., trainable=False, derived=True)"
            )


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a site is, without the module itself, so that a hook can hold it and still be pickled."""

    path: str
    kind: LayerKind
    d_in: int
    d_out: int
    has_bias: bool


class Site:
    """One layer as a variant sees it. Shapes are always at hand; values are read from the module on request.

    A delta must not read `path`: a compiler would build one graph per layer.

    Attributes:
        d_in: the size of the last dimension of x.
        d_out: the size of the last dimension of y.
        has_bias: whether y = W x + b has a b.
        weight_was_read: whether `weight` or `matmul` was called.
    """

    __slots__ = ("_module", "_spot", "d_in", "d_out", "has_bias", "weight_was_read")

    def __init__(self, spot: Spot, module: nn.Module) -> None:
        self._spot, self._module, self.weight_was_read = spot, module, False
        self.d_in, self.d_out, self.has_bias = spot.d_in, spot.d_out, spot.has_bias

    @property
    def path(self) -> str:
        """The layer's name in the model, e.g. `model.layers.0.mlp.down_proj`."""
        return self._spot.path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self._spot.kind.dtype(self._module)

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode (for dropout)."""
        return self._module.training

    def bias(self) -> Tensor:
        """b, shape (d_out,), detached.

        Raises:
            AttributeError: the layer has no bias (ask `has_bias` first).
        """
        bias = self._spot.kind.bias(self._module)
        if bias is None:
            raise AttributeError("this site has no bias; ask site.has_bias first")
        return bias.detach()

    def weight(self) -> Tensor:
        """W, dense, shape (d_out, d_in), detached; dequantised where the layer is quantised. Not to be written."""
        self.weight_was_read = True
        return self._spot.kind.weight(self._module).detach()

    def matmul(self, m: Tensor) -> Tensor:
        """M Wᵀ for M of shape (k, d_in): shape (k, d_out), without a dense copy of W where the layer's kind can."""
        self.weight_was_read = True
        return self._spot.kind.matmul(self._module, m)

    def __repr__(self) -> str:
        return f"Site({self.path!r}, d_in={self.d_in}, d_out={self.d_out}, bias={self.has_bias})"


class Observer(Protocol):
    """Gathers what calibration needs to know about one site, in bounded memory."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in the rows of one batch: x (rows, d_in) and the base output y (rows, d_out), padding already dropped."""

    def result(self) -> dict[str, Tensor]:
        """The site's statistics, as `specialize` and `init` receive them."""


class Variant(BaseModel):
    """A method with its hyperparameters chosen. Subclass it, name it, write `tensors`, `init` and one delta.

    `site` is a `Site`, `t` maps tensor names to tensors, x is (..., d_in), y is (..., d_out).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        ser_json_inf_nan="constants",
    )

    name: ClassVar[str] = ""
    format: ClassVar[int] = 1
    takes_scale: ClassVar[bool] = False
    recommended_lr: ClassVar[float] = 1e-3
    default_targets: ClassVar[tuple[str, ...]] = ()
    detached: ClassVar[tuple[str, ...]] = ()
    acts_on_bias: ClassVar[bool] = False

    # --- init

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors of this site, from its shapes alone. Raises `SiteError` where the variant does not fit."""
        raise NotImplementedError

    def derive(self, site: Site) -> dict[str, Tensor]:
        """The tensors declared `derived`, computed from the base weight alone, the same way every time."""
        return {}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        """The start values of all other tensors. `rng(tensor_name)` gives a CPU generator of that tensor's own;
        `statistics` is what this site's observer returned (empty without one).
        """
        raise NotImplementedError

    @property
    def identity(self) -> Identity:
        """What Δ = 0 at init means for these field values: bitwise, up to rounding, or not at all."""
        return "exact"

    # --- forward delta

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        """A forward's token-independent work, added to the `t` that the deltas get. Once a forward (a side, where a variant
        has both deltas), and once for all under `adapter.frozen()`. Names listed in `detached` are constants to gradients.
        """
        return {}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        """Δx, of x's shape and dtype, added to the layer's input."""
        raise NotImplementedError

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """Δy, of y's shape and dtype, added to the layer's output. y is the plain base output W x + b, and x the input that
        the layer was given (after all input deltas).
        """
        raise NotImplementedError

    # --- calibrate

    def observe(self, site: Site) -> Observer | None:
        """An observer, where these field values need calibration data; None where they do not."""
        return None

    def specialize(
        self, sites: Mapping[str, Site], statistics: Mapping[str, Tensors]
    ) -> "Mapping[str, Variant | None]":
        """Per-site variants chosen from the statistics of all sites. None drops a site; one not mentioned stays as it is."""
        return {}

    # --- training

    def project(self, site: Site, t: Tensors) -> None:
        """Bring the stored tensors back into the allowed set, in place, after an optimizer step."""

    def penalty(self, site: Site, t: Tensors) -> Tensor | None:
        """A scalar to be added to the loss, or None."""
        return None

    # --- state dict

    def state_dict(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        """What is saved of the stored tensors."""
        return dict(t)

    def load_state_dict(self, site: Site, saved: Tensors) -> dict[str, Tensor]:
        """The stored tensors, from what was saved: the inverse of `state_dict`."""
        return dict(saved)

    @classmethod
    def upgrade(
        cls, fields: dict[str, Any], tensors: dict[str, Tensor], from_format: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One site's fields and saved tensors of an older `format`, brought to this one. Raise `format` when files change."""
        raise VariantDefinitionError(
            f"{cls.name!r} of format {cls.format} has no upgrade from format {from_format}"
        )

    # --- costs

    def macs_per_token(self, site: Site) -> int:
        """Multiply-accumulates of matrix products that the deltas add for each token, exact."""
        return 0

    def macs_per_forward(self, site: Site) -> int:
        """Multiply-accumulates of matrix products in `prepare`: once a forward, whatever the number of tokens."""
        return 0

    # --- plumbing

    @classmethod
    @hookimpl
    def lora_lite_variant(cls, name: str) -> "type[Variant] | None":
        """Answers pluggy: this class, if it goes by `name`."""
        return cls if cls.name == name else None

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        if name and not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise VariantDefinitionError(
                f"{cls.__qualname__}: name={name!r} must be lower_snake_case"
            )
        for field, annotation in inspect.get_annotations(cls).items():
            if "ClassVar" not in str(annotation) and (
                field in ATTACH_WORDS or hasattr(Variant, field)
            ):
                what = (
                    "is an argument of attach()"
                    if field in ATTACH_WORDS
                    else f"shadows Variant.{field}"
                )
                away = "rename it, or write a method or ClassVar to override"
                raise VariantDefinitionError(
                    f"{cls.__qualname__}: the field {field!r} {what}; {away}"
                )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if any(cls.__pydantic_generic_metadata__[key] for key in ("origin", "parameters")):
            raise VariantDefinitionError(
                f"{cls.__qualname__}: a variant cannot be generic (generic models do not pickle)"
            )

    def __str__(self) -> str:
        fields = ", ".join(f"{field}={getattr(self, field)!r}" for field in type(self).model_fields)
        return f"{self.name}({fields})"


class ScaledVariant(Variant):
    """A variant that applies `adapter.scale` itself, for methods with a coefficient of their own.

    `prepare` and the deltas are given the scale as a keyword, and the core does not multiply what
    they return. At scale 0 they must return 0, bit for bit.
    """

    takes_scale: ClassVar[bool] = True

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        """As `Variant.prepare`, at this scale."""
        return {}

    def delta_input(self, site: Site, t: Tensors, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """As `Variant.delta_input`, scale included."""
        raise NotImplementedError

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        """As `Variant.delta_output`, scale included."""
        raise NotImplementedError
