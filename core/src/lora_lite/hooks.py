"""The forward delta: what runs on an adapted layer.

    x' = x + Σ s Δx(x),        y' = (W x' + b) + Σ s Δy(x', W x' + b)

One `SiteHooks` a layer, whatever the number of adapters, holds one `Entry` for each. Neither holds a module or anything of
a call, so a model with adapters can be copied, pickled, compiled, checkpointed and wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite.calibration import describe
from lora_lite.errors import AdapterError, VariantContractError
from lora_lite.layers import layer_input
from lora_lite.targets import Placement
from lora_lite.variant import Site, Variant


class Control:
    """What all sites of one adapter share, and what `Adapter` turns: its scale, and whether it is on or frozen."""

    def __init__(self, name: str, variant: Variant, seed: int, scale: float = 1.0) -> None:
        self.name = name
        self.variant = variant
        self.seed = seed
        self.scale = scale
        self.enabled = True
        self.frozen = False
        self.uses_base = False
        self.entries: dict[str, Entry] = {}


class Entry:
    """One adapter at one site."""

    def __init__(self, control: Control, placement: Placement) -> None:
        cls = type(placement.variant)
        self.control = control
        self.spot = placement.spot
        self.variant = placement.variant
        self.specs = dict(placement.specs)
        self.attributes = {name: attribute(control.name, name) for name in placement.specs}
        self.reads = tuple((n, self.attributes[n], spec.compute == "float32") for n, spec in self.specs.items())
        self.prepares = cls.prepare is not Variant.prepare
        self.has_input_delta = cls.delta_input is not Variant.delta_input
        self.has_output_delta = cls.delta_output is not Variant.delta_output
        self.prepared: dict[tuple[torch.dtype, float], dict[str, Tensor]] = {}

    def stored(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors as they are stored on the layer."""
        return {name: getattr(module, key) for name, key in self.attributes.items()}

    def input_delta(self, module: nn.Module, x: Tensor) -> Tensor:
        """The factor s times Δx."""
        return self._delta(module, x, lambda site, t, extra: self.variant.delta_input(site, t, x, **extra))

    def output_delta(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The factor s times Δy."""
        return self._delta(module, y, lambda site, t, extra: self.variant.delta_output(site, t, x, y, **extra))

    def _delta(self, module: nn.Module, like: Tensor, delta_of: Callable[..., Tensor]) -> Tensor:
        scale = self.control.scale
        extra = {"scale": scale} if self.variant.takes_scale else {}
        site = Site(self.spot, module)
        t = self._read(module, like)
        if self.prepares:
            t.update(self._prepare(site, t, like.dtype, extra))
        delta = self._checked(delta_of(site, t, extra), like)
        return delta if extra or scale == 1.0 else delta * scale

    def _read(self, module: nn.Module, like: Tensor) -> dict[str, Tensor]:
        at_least_float32 = torch.promote_types(like.dtype, torch.float32)
        t = {}
        for name, key, precise in self.reads:
            value = getattr(module, key)
            if value.device != like.device:
                raise AdapterError(
                    f"adapter {self.control.name!r}: tensor {key!r} is on {value.device}, the activation on {like.device}; "
                    "attach or load after the model is where it shall stay, or move both with model.to(device)"
                )
            floating = value.is_floating_point()  # an index stays what it is
            t[name] = value.to(at_least_float32 if precise else like.dtype) if floating else value
        return t

    def _prepare(self, site: Site, t: dict[str, Tensor], dtype: torch.dtype, extra: dict[str, float]) -> dict[str, Tensor]:
        """Under `frozen()` the same for every call without gradients; else afresh."""
        reuse = self.control.frozen and not torch.is_grad_enabled()
        key = (dtype, self.control.scale)
        if reuse and key in self.prepared:
            return self.prepared[key]
        prepared = self.variant.prepare(site, t, **extra)
        for name in self.variant.detached:
            prepared[name] = prepared[name].detach()
        if reuse:
            self.prepared[key] = prepared
        return prepared

    def _checked(self, delta: Tensor, like: Tensor) -> Tensor:
        if delta.shape == like.shape and delta.dtype == like.dtype:
            return delta
        if delta.shape == like.shape and torch.is_autocast_enabled(like.device.type):
            return delta.to(like.dtype)
        raise VariantContractError(
            f"variant {self.variant.name!r} gave a delta of {describe(delta)} for an activation of {describe(like)}; "
            "a delta has the shape and dtype of what it is added to"
        )


class SiteHooks:
    """The two hooks of one layer, and the adapters they serve, in the order of their names: the sum of the deltas does not
    depend on the order of attachment.
    """

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self.handles: list[RemovableHandle] = []

    def add(self, entry: Entry) -> None:
        self.entries = tuple(sorted((*self.entries, entry), key=lambda e: e.control.name))

    def drop(self, entry: Entry) -> None:
        self.entries = tuple(e for e in self.entries if e is not entry)

    def register(self, module: nn.Module) -> None:
        """Hook the layer. Ahead of the hooks that are there, so that users' own hooks see the adapted y."""
        self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(module.register_forward_hook(self.after, with_kwargs=True, prepend=True))

    def unregister(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = layer_input(args, kwargs)
        live = [e for e in self.entries if e.has_input_delta and e.control.enabled]
        if not live:
            return None
        x = x + _sum(e.input_delta(module, x) for e in live)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        live = [e for e in self.entries if e.has_output_delta and e.control.enabled]
        if not live:
            return None
        x = layer_input(args, kwargs)
        return y + _sum(e.output_delta(module, x, y) for e in live)


def attribute(adapter: str, tensor: str) -> str:
    """The name on the layer of an adapter's tensor."""
    return f"lora_{adapter}_{tensor}"


def hooks_of(module: nn.Module) -> SiteHooks | None:
    """The adapter hooks on a layer, if it has any."""
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, SiteHooks):
            return owner
    return None


def _sum(deltas: Iterable[Tensor]) -> Tensor:
    first, *rest = deltas
    for delta in rest:
        first = first + delta
    return first
