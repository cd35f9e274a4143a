"""The methods of a variant, called by hand: what the core does around them, in its plainest form.

The promises compare what an adapted layer computes with this. It is also the only file of the suite
that knows how the core names an adapter's tensors on a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lite.author import (
    GradientObserver,
    Observer,
    ScaledVariant,
    Site,
    Tensors,
    TensorSpec,
    Variant,
)
from lora_lite.calibration import wants_gradients
from lora_lite.hooked import hooks_of
from lora_lite.shared import name_on_root

# The one tensor that the core adds of its own accord: a digest of variant and fields, on the first
# layer of an adapter, so that a state dict of other fields is refused.
DIGEST = "fields"

# A step beyond the end of any schedule.
LATE = 10**9


def attribute(adapter: str, tensor: str) -> str:
    """The name of an adapter's tensor on its layer."""
    return f"lora_{adapter}_{tensor}"


def place(adapter: str, path: str, variant: Variant, name: str, spec: TensorSpec) -> str:
    """The name on the model of a tensor that a variant declares for the layer at a path."""
    if spec.shared:
        return attribute(adapter, name_on_root(variant.name, spec))
    return f"{path}.{attribute(adapter, name)}"


def stored(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The declared tensors of the adapter called "default", as they are stored on its layer."""
    hooks = hooks_of(layer)
    assert hooks is not None, "no adapter is attached to this layer"
    return next(each for each in hooks.attachments if each.state.name == "default").stored(layer)


def observe(observer: Observer | GradientObserver, x: Tensor, y: Tensor) -> None:
    """One batch for an observer, with gradients if it wants them: those of Σ (1 - cos y)."""
    if wants_gradients(observer):
        cast(GradientObserver, observer).update(x, y, y.sin())
    else:
        cast(Observer, observer).update(x, y)


def read(variant: Variant, site: Site, values: Tensors) -> dict[str, Tensor]:
    """Stored tensors as the deltas get them: floats cast as `TensorSpec.compute` says."""
    precise = torch.promote_types(site.dtype, torch.float32)
    t = {}
    for name, spec in variant.tensors(site).items():
        dtype = precise if spec.compute == "float32" else site.dtype
        value = values[name]
        t[name] = value.to(dtype) if value.is_floating_point() else value
    return t


def has(variant: Variant, method: str) -> bool:
    """Whether a variant has written this method of the contract itself."""
    defaults = (getattr(Variant, method), getattr(ScaledVariant, method))
    return getattr(type(variant), method) not in defaults


def has_both_deltas(variant: Variant) -> bool:
    """Output deltas see the changed input: then the changes of an output do not simply add up."""
    return has(variant, "delta_input") and has(variant, "delta_output")


def prepared(variant: Variant, site: Site, t: Tensors) -> dict[str, Tensor]:
    """What `prepare` adds to the tensors, at scale 1."""
    if not has(variant, "prepare"):
        return {}
    found: dict[str, Tensor] = variant.prepare(site, t, **_scale(variant))
    shadowed = sorted(found.keys() & variant.tensors(site).keys())
    assert not shadowed, (
        f"prepare returns {shadowed}, which are names of stored tensors; choose other names"
    )
    others = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
    assert not others, f"prepare returns {others}, expected tensors alone"
    return found


def deltas(
    variant: Variant, site: Site, t: Tensors, x: Tensor, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(Δx, Δy) at scale 1. None where the variant has no such delta."""
    before = after = None
    if has(variant, "delta_input"):
        before = variant.delta_input(site, t, x, **_scale(variant))
    if has(variant, "delta_output"):
        after = variant.delta_output(site, t, x, y, **_scale(variant))
    return before, after


def forward(variant: Variant, site: Site, t: Tensors, x: Tensor) -> Tensor:
    """W x' + b + Δy with x' = x + Δx, by hand; `t` holds the prepared tensors too."""
    if has(variant, "delta_input"):
        x = x + variant.delta_input(site, t, x, **_scale(variant))
    y = nn.functional.linear(x, site.weight(), site.bias() if site.has_bias else None)
    if has(variant, "delta_output"):
        y = y + variant.delta_output(site, t, x, y, **_scale(variant))
    return y


def all_deltas(variant: Variant, site: Site, values: Tensors, x: Tensor, y: Tensor) -> list[Tensor]:
    """The deltas of stored tensors: cast, prepared and called in turn."""
    t = read(variant, site, values)
    t.update(prepared(variant, site, t))
    return [delta for delta in deltas(variant, site, t, x, y) if delta is not None]


class NamelessSite:
    """A site that refuses to tell its path, and passes everything else on."""

    def __init__(self, site: Site) -> None:
        self._site = site

    @property
    def path(self) -> str:
        """Raises an AssertionError: whoever asks breaks the promise."""
        raise AssertionError("`site.path` is read in a forward")

    def __repr__(self) -> str:
        return self.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)


def nameless(site: Site) -> Site:
    """The site without its path."""
    return cast(Site, NamelessSite(site))


class WatchedTensors(dict[str, Tensor]):
    """Tensors by name, which remember the names that were looked up."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        # `dict(t)`, `{**t}` and `t.items()` look at every tensor.
        self.seen.update(super().keys())
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self.seen.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        """As of a dict."""
        self.seen.update(super().keys())
        return super().items()

    def values(self) -> Any:
        """As of a dict."""
        self.seen.update(super().keys())
        return super().values()


@contextmanager
def attributes_read(cls: type[Variant]) -> Iterator[set[str]]:
    """The names of the attributes that are read from instances of a class, while in the context."""
    seen: set[str] = set()
    before = cls.__getattribute__

    def watched(self: Variant, name: str) -> Any:
        seen.add(name)
        return before(self, name)

    own = "__getattribute__" in cls.__dict__
    cls.__getattribute__ = watched  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        if own:
            cls.__getattribute__ = before  # type: ignore[method-assign]
        else:
            del cls.__getattribute__


def _scale(variant: Variant) -> dict[str, Any]:
    return {"scale": 1.0} if variant.takes_scale else {}
