"""The forward delta: what runs on an adapted layer.

    x' = x + Σ s Δx(x),        y' = (W x' + b) + Σ s Δy(x', W x' + b)

One `SiteHooks` a layer, whatever the number of adapters, holds one `Entry` for each. Neither holds a module or anything of
a call, so a model with adapters can be copied, pickled, compiled, checkpointed and wrapped.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite.calibration import describe
from lora_lite.errors import AdapterError, VariantContractError
from lora_lite.layers import layer_input
from lora_lite.targets import Placement
from lora_lite.variant import ScaledVariant, Site, Variant


class Control:
    """What all sites of one adapter share, and what `Adapter` turns: its scale, and whether it is on or frozen."""

    def __init__(
        self, name: str, variant: Variant, seed: int, scale: float = 1.0, uses_base: bool = False
    ) -> None:
        self.name, self.variant, self.seed, self.scale, self.uses_base = (
            name,
            variant,
            seed,
            scale,
            uses_base,
        )
        self.enabled, self.frozen = True, False
        self.entries: dict[str, Entry] = {}


class Entry:
    """One adapter at one site."""

    def __init__(self, control: Control, placement: Placement) -> None:
        cls = type(placement.variant)
        self.control, self.spot, self.variant = control, placement.spot, placement.variant
        self.specs = dict(placement.specs)
        self.attributes = {name: attribute(control.name, name) for name in self.specs}
        self.prepares = cls.prepare not in (Variant.prepare, ScaledVariant.prepare)
        self.has_input_delta = cls.delta_input not in (
            Variant.delta_input,
            ScaledVariant.delta_input,
        )
        self.has_output_delta = cls.delta_output not in (
            Variant.delta_output,
            ScaledVariant.delta_output,
        )
        self.prepared: dict[tuple[torch.dtype, float], dict[str, Tensor]] = {}

    def stored(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors as they are stored on the layer."""
        return {name: getattr(module, key) for name, key in self.attributes.items()}

    def delta(self, module: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The factor s times Δy for the output y, or times Δx without one."""
        like, scale = x if y is None else y, self.control.scale
        extra = {"scale": scale} if self.variant.takes_scale else {}
        site, t = Site(self.spot, module), self._read(module, like)
        if self.prepares:
            t.update(self._prepare(site, t, like, extra))
        variant = self.variant
        delta = (
            variant.delta_input(site, t, x, **extra)
            if y is None
            else variant.delta_output(site, t, x, y, **extra)
        )
        if (
            delta.shape == like.shape
            and delta.dtype != like.dtype
            and torch.is_autocast_enabled(like.device.type)
        ):
            delta = delta.to(like.dtype)
        if delta.shape != like.shape or delta.dtype != like.dtype:
            gave = f"variant {variant.name!r} gave a delta of {describe(delta)} for an activation of {describe(like)}"
            raise VariantContractError(
                f"{gave}; a delta has the shape and dtype of what it is added to"
            )
        return delta if extra or scale == 1.0 else delta * scale

    def _read(self, module: nn.Module, like: Tensor) -> dict[str, Tensor]:
        dtypes = {
            "activation": like.dtype,
            "float32": torch.promote_types(like.dtype, torch.float32),
        }
        t: dict[str, Tensor] = {}
        for name, value in self.stored(module).items():
            if value.device != like.device:
                where = f"tensor {self.attributes[name]!r} is on {value.device}, the activation on {like.device}"
                raise AdapterError(
                    f"{where}; attach or load where the model shall stay, or move both with model.to(device)"
                )
            # An index stays what it is.
            t[name] = (
                value.to(dtypes[self.specs[name].compute]) if value.is_floating_point() else value
            )
        return t

    def _prepare(
        self, site: Site, t: dict[str, Tensor], like: Tensor, extra: dict[str, float]
    ) -> dict[str, Tensor]:
        """Under `frozen()` the same for every call without gradients; else afresh. Autocast would undo `TensorSpec.compute`."""
        reuse = self.control.frozen and not torch.is_grad_enabled()
        key = (like.dtype, self.control.scale)
        if reuse and key in self.prepared:
            return self.prepared[key]
        with torch.autocast(like.device.type, enabled=False):
            prepared = self.variant.prepare(site, t, **extra)
        prepared |= {name: prepared[name].detach() for name in self.variant.detached}
        if reuse:
            self.prepared[key] = prepared
        return prepared


class SiteHooks:
    """The two hooks of one layer, and the adapters they serve, in the order of their names: the sum of the deltas does not
    depend on the order of attachment.
    """

    def __init__(self, module: nn.Module) -> None:
        self.entries: tuple[Entry, ...] = ()
        # Ahead of the hooks that are there, so that users' own hooks see the adapted y.
        before = module.register_forward_pre_hook(self.before, with_kwargs=True)
        after = module.register_forward_hook(self.after, with_kwargs=True, prepend=True)
        self.handles: tuple[RemovableHandle, ...] = (before, after)

    def add(self, entry: Entry) -> None:
        """Serve one adapter more."""
        self.entries = tuple(sorted((*self.entries, entry), key=lambda e: e.control.name))

    def remove(self, entry: Entry) -> None:
        """Serve one adapter less; the hooks go with the last."""
        self.entries = tuple(other for other in self.entries if other is not entry)
        for handle in () if self.entries else self.handles:
            handle.remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = layer_input(args, kwargs)
        deltas = [
            entry.delta(module, x)
            for entry in self.entries
            if entry.has_input_delta and entry.control.enabled
        ]
        if not deltas:
            return None
        x = sum(deltas, start=x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        x = layer_input(args, kwargs)
        deltas = [
            entry.delta(module, x, y)
            for entry in self.entries
            if entry.has_output_delta and entry.control.enabled
        ]
        return sum(deltas, start=y) if deltas else None


def attribute(adapter: str, tensor: str) -> str:
    """The name on the layer of an adapter's tensor."""
    return f"lora_{adapter}_{tensor}"


def hooks_of(module: nn.Module) -> SiteHooks | None:
    """The adapter hooks on a layer, if it has any."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SiteHooks)), None)
