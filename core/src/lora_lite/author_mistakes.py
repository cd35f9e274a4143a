"""Mistakes in the methods of a variant, found when the core calls them.

Whatever a method raises or returns against its contract becomes a `VariantContractError` that names
the variant, the method and the value. The class itself is checked in `definition`.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lora_lite.errors import VariantContractError
from lora_lite.per_expert import PerExpert, variant_of
from lora_lite.site import Site
from lora_lite.tensor_spec import CLOCK, TensorSpec
from lora_lite.variant import Variant, overrides

# What a misspelt name, a wrong argument or an assignment to a frozen variant raises.
MISTAKES = (AttributeError, KeyError, NameError, NotImplementedError, TypeError, ValidationError)

# `Attachment` keeps a digest of the fields under this name.
RESERVED = "fields"


class calling:  # noqa: N801 (reads as a statement: `with calling(variant, "init", path):`)
    """A context around one call of a variant's method, which turns its mistakes into one error."""

    __slots__ = ("method", "path", "variant")

    def __init__(self, variant: Variant, method: str, path: str = "") -> None:
        self.variant = variant
        self.method = method
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, MISTAKES):
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise contract_error(
                self.variant, self.method, f"fails: {type(error).__name__}: {reason}", self.path
            ) from error


def contract_error(
    variant: Variant, method: str, problem: str, path: str = "", expected: str = ""
) -> VariantContractError:
    """The error for a method of a variant, at a layer if there is one."""
    where = f" at {path}" if path else ""
    return VariantContractError(
        f"{type(variant).__qualname__}.{method} of variant {variant.name!r}{where} {problem}",
        expected=expected,
        variant=variant.name,
        layer=path,
    )


def checked_specs(methods: Variant | PerExpert, site: Site) -> dict[str, TensorSpec]:
    """What `tensors` declares for a site.

    Raises:
        SiteError: the variant does not fit the site.
        VariantContractError: it declares no tensor, or something that is no `TensorSpec`.
    """
    variant = variant_of(methods)
    with calling(variant, "tensors", site.path):
        specs = methods.tensors(site)
    if not isinstance(specs, dict) or not specs:
        raise contract_error(
            variant, "tensors", f"returns {specs!r}", site.path, "It returns {name: TensorSpec}"
        )
    for name, spec in specs.items():
        if not isinstance(spec, TensorSpec):
            raise contract_error(
                variant,
                "tensors",
                f"gives {name!r} as {spec!r}",
                site.path,
                "Expected a TensorSpec",
            )
        if not isinstance(name, str) or not name.isidentifier() or name == RESERVED:
            raise contract_error(
                variant,
                "tensors",
                f"names a tensor {name!r}",
                site.path,
                f"A tensor's name is a Python identifier other than {RESERVED!r}",
            )
    if overrides(type(variant), "advance") and specs.get("step") != CLOCK:
        raise contract_error(
            variant,
            "tensors",
            f"declares the tensor 'step' as {specs.get('step')}",
            site.path,
            "A variant with `advance` declares {'step': lora_lite.author.CLOCK}",
        )
    return specs


def checked_tensors(variant: Variant, method: str, given: object, path: str) -> dict[str, Tensor]:
    """What a method returns, if that is a mapping from names to tensors.

    Raises:
        VariantContractError: it is not.
    """
    if not isinstance(given, Mapping):
        raise contract_error(
            variant, method, f"returns {given!r}", path, "It returns {name: tensor}"
        )
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise contract_error(
                variant, method, f"gives {name!r} as {value!r}", path, "Expected a tensor"
            )
    return dict(given)


def checked_prepared(
    variant: Variant, given: object, specs: Mapping[str, TensorSpec], path: str
) -> dict[str, Tensor]:
    """What `prepare` returns.

    Raises:
        VariantContractError: no tensors, one with a stored tensor's name, or not what `detached`
            names.
    """
    prepared = checked_tensors(variant, "prepare", given, path)
    shadowed = [name for name in prepared if name in specs]
    if shadowed:
        raise contract_error(
            variant,
            "prepare",
            f"returns {', '.join(shadowed)}",
            path,
            "A prepared tensor may not have the name of a stored one",
        )
    missing = [name for name in variant.detached if name not in prepared]
    if missing:
        raise contract_error(
            variant,
            "prepare",
            f"does not return {', '.join(missing)}, which `detached` names",
            path,
        )
    return prepared


def checked_delta(
    variant: Variant, method: str, delta: object, like: Tensor, path: str = ""
) -> Tensor:
    """A delta, which has the shape and dtype of what it is added to. Autocast may change the dtype.

    Raises:
        VariantContractError: it is not a tensor, or has another shape or dtype.
    """
    if not isinstance(delta, Tensor):
        raise contract_error(variant, method, f"returns {delta!r}", path, "It returns a tensor")
    if delta.shape == like.shape:
        if delta.dtype == like.dtype:
            return delta
        if torch.is_autocast_enabled(like.device.type):
            return delta.to(like.dtype)
    raise contract_error(
        variant,
        method,
        f"returns {describe(delta)} for an activation of {describe(like)}",
        path,
        "A delta has the shape and dtype of what it is added to",
    )


def checked_macs(methods: Variant | PerExpert, method: str, site: Site) -> int:
    """What `macs_per_token` or `macs_per_forward` tells, a whole number of at least 0."""
    variant = variant_of(methods)
    with calling(variant, method, site.path):
        macs: Any = getattr(methods, method)(site)
    if not isinstance(macs, int) or macs < 0:
        raise contract_error(
            variant, method, f"returns {macs!r}", site.path, "It returns a whole number"
        )
    return macs


def checked_penalty(variant: Variant, penalty: object, path: str) -> Tensor | None:
    """What `penalty` returns: a scalar tensor or None."""
    if penalty is None or (isinstance(penalty, Tensor) and penalty.ndim == 0):
        return penalty
    shown = describe(penalty) if isinstance(penalty, Tensor) else repr(penalty)
    raise contract_error(
        variant, "penalty", f"returns {shown}", path, "It returns a scalar tensor, or None"
    )


def checked_identity(variant: Variant) -> None:
    """An error if `identity` is none of the words that the contract knows."""
    if variant.identity not in ("exact", "rounding", "none"):
        raise contract_error(
            variant,
            "identity",
            f"is {variant.identity!r}",
            expected="It is 'exact', 'rounding' or 'none'",
        )


def describe(tensor: Tensor) -> str:
    """A tensor's dtype and shape, for an error: `float32[2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
