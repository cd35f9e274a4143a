"""The contract: what a variant is, what it puts on a layer, and what it is told about the layer.

A variant is a frozen pydantic model. Its fields are the method's hyperparameters, and its methods
are called in the order in which an adapter lives:

    calibrate      observe, specialize
    init           tensors, derive, init
    forward delta  prepare, delta_input, delta_output      x' = x + s Δx,   y' = (W x' + b) + s Δy
    state dict     state_dict, load_state_dict

Every method but `project` and `advance` is pure: it reads its arguments and returns tensors. The
core places, names, casts, registers and saves them, and never writes a base weight.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lora_lite.definition import PLAIN_VALUES, VariantMeta, check_definition, check_fields
from lora_lite.errors import AdapterFileError
from lora_lite.hookspecs import hookimpl
from lora_lite.site import Site
from lora_lite.tensor_spec import TensorSpec

Identity = Literal["exact", "rounding", "none"]
Rng = Callable[[str], torch.Generator]
Tensors = Mapping[str, Tensor]


class Observer(Protocol):
    """Gathers what calibration needs to know about one site, in bounded memory."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in the rows of one batch.

        Args:
            x: (rows, d_in), the layer's inputs without padding.
            y: (rows, d_out), the base's outputs for them.
        """

    def result(self) -> dict[str, Tensor]:
        """The site's statistics, as `specialize` and `init` receive them."""


class GradientObserver(Protocol):
    """An observer that also sees the gradients of a loss (see `attach(loss=...)`)."""

    wants_gradients: ClassVar[Literal[True]] = True

    def update(self, x: Tensor, y: Tensor, grad_y: Tensor) -> None:
        """Take in the rows of one batch.

        Args:
            x: (rows, d_in), the layer's inputs without padding.
            y: (rows, d_out), the base's outputs for them.
            grad_y: (rows, d_out), the gradient of the batch's loss by y.
        """

    def result(self) -> dict[str, Tensor]:
        """The site's statistics, as `specialize` and `init` receive them."""


class Variant(BaseModel, metaclass=VariantMeta):
    """A method with its hyperparameters chosen.

    Subclass it, give it a name (`class LoRA(Variant, name="lora")`), and write `tensors`, `init`
    and one delta. In all methods `site` is a `Site`, `t` maps tensor names to tensors, x is
    (..., d_in) and y is (..., d_out).

    Set `replaces_weights` if the tensors stand in place of the layer's own: what they are is then
    no matter of the base, whose weights there are not compared when a file is loaded; and the
    variant goes to modules without a weight matrix too (see `Site.has_matrix`).
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        ser_json_inf_nan="constants",
        ignored_types=PLAIN_VALUES,  # `check_definition` looks at them
    )

    name: ClassVar[str] = ""
    format: ClassVar[int] = 1
    takes_scale: ClassVar[bool] = False
    recommended_lr: ClassVar[float] = 1e-3
    default_targets: ClassVar[tuple[str, ...]] = ()
    detached: ClassVar[tuple[str, ...]] = ()
    acts_on_bias: ClassVar[bool] = False
    replaces_weights: ClassVar[bool] = False

    # --- init

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors of this site, from its shapes alone: `plan` calls this on meta models.

        Raises:
            SiteError: the variant does not fit this site.
        """
        raise NotImplementedError

    def derive(self, site: Site) -> dict[str, Tensor]:
        """The tensors declared `derived`: from the base weight alone, the same way every time."""
        return {}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        """The start values of all other tensors.

        Args:
            site: the layer.
            derived: what `derive` gave.
            statistics: what the site's observer gave; empty without one.
            rng: `rng(tensor_name)` is a CPU generator of that tensor's own.
        """
        raise NotImplementedError

    @property
    def identity(self) -> Identity:
        """How a fresh adapter leaves the output: the same bits, the same up to rounding, or not."""
        return "exact"

    # --- forward delta

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        """The part of a forward that does not depend on the tokens, added to the `t` of the deltas.

        Runs once a forward (once a side, for a variant with both deltas), and once for all under
        `adapter.frozen()`. Tensors named in `detached` are constants to gradients. A prepared
        tensor may not have the name of a stored one.
        """
        return {}

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        """Δx, of x's shape and dtype, added to the layer's input."""
        raise NotImplementedError

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """Δy, of y's shape and dtype, added to the layer's output.

        y is the plain base output W x + b, and x the input that the layer was given, after all
        input deltas.
        """
        raise NotImplementedError

    # --- calibrate

    def observe(self, site: Site) -> Observer | GradientObserver | None:
        """An observer, if these field values need calibration data; None if they do not."""
        return None

    def specialize(
        self, sites: Mapping[str, Site], statistics: Mapping[str, Tensors]
    ) -> "Mapping[str, Variant | None]":
        """Other hyperparameters for some sites, chosen from the statistics of all sites.

        None drops a site; a site that is not mentioned stays as it is.
        """
        return {}

    # --- training

    def project(self, site: Site, t: Tensors) -> None:
        """Bring the parameters back into the allowed set, in place, after an optimizer step."""

    def advance(self, sites: Mapping[str, Site], t: Mapping[str, Tensors], step: int) -> None:
        """Change the tensors of all layers together, in place, after an optimizer step.

        For methods that follow a schedule, or share a budget among layers. Before `project`.

        Args:
            sites: the layers of this very variant, by path.
            t: their stored tensors; `t[path][name].grad` is the gradient of this step, or None.
            step: its number, from 1. It is kept in the tensor "step", which `tensors` must declare
                as `CLOCK`, so that a run that is resumed goes on counting.
        """

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
        """The fields and saved tensors of one site in an older `format`, brought to this one.

        Raise `format` by one whenever fields or saved tensors change, and write this method.

        Raises:
            AdapterFileError: the format is too old.
        """
        raise AdapterFileError(
            f"variant {cls.name!r} has no upgrade from format {from_format} to {cls.format}",
            fix="Load the file with the version that wrote it; the author of the variant may write "
            "the class method `upgrade`",
        )

    # --- costs

    def macs_per_token(self, site: Site) -> int:
        """The multiply-accumulates of matrix products that the deltas add for each token, exact."""
        return 0

    def macs_per_forward(self, site: Site) -> int:
        """Those of `prepare`: once a forward, whatever the number of tokens."""
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
        check_fields(cls, Variant)  # before pydantic looks at them, which warns in its own words

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        check_definition(cls, Variant)

    def __str__(self) -> str:
        fields = [f"{field}={getattr(self, field)!r}" for field in type(self).model_fields]
        return f"{self.name}({', '.join(fields)})"


class ScaledVariant(Variant):
    """A variant that applies `adapter.scale` itself, for methods with a coefficient of their own.

    `prepare` and the deltas get the scale as a keyword, and the core does not multiply what they
    return. At scale 0 they must return 0, bit for bit.
    """

    takes_scale: ClassVar[bool] = True

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        """As `Variant.prepare`, at this scale."""
        return {}

    def delta_input(self, site: Site, t: Tensors, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """As `Variant.delta_input`, with the scale applied."""
        raise NotImplementedError

    def delta_output(
        self, site: Site, t: Tensors, x: Tensor, y: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        """As `Variant.delta_output`, with the scale applied."""
        raise NotImplementedError


@lru_cache(maxsize=1024)
def overrides(cls: type[Variant], method: str) -> bool:
    """Whether a class has a method of its own in place of the contract's default."""
    return bool(getattr(cls, method).__module__ != Variant.__module__)
