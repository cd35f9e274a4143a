"""An adapter on a layer: its tensors there, and the deltas that they give.

An `Attachment` is one adapter on one layer, and the attachments of an adapter have one
`AdapterState`. Neither of them, nor the hooks that serve them, holds a module or anything of a
call, so that a model with adapters can be copied, pickled, compiled, checkpointed and wrapped.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lite.author_mistakes import calling, checked_delta, checked_prepared
from lora_lite.errors import AdapterError
from lora_lite.layers import layer_input, with_input
from lora_lite.per_expert import PerExpert, methods_for
from lora_lite.recipe import Recipe
from lora_lite.row_selection import RowSelection
from lora_lite.shared import linked_root, name_on_root
from lora_lite.site import LayerSpec, Site
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import ScaledVariant, Tensors, Variant, overrides


@dataclass(eq=False)
class AdapterState:
    """What all layers of one adapter share.

    Attributes:
        name: under which it is attached.
        recipe: the variants, as asked for.
        seed: of the random start values.
        scale: the factor s.
        uses_base: whether any tensor was computed from the base's weights.
        is_loaded: whether it came from a file.
        was_trained: whether a training forward of the whole model has ended since it came.
        was_told_of_saving: whether the user was told what `save_pretrained` saves.
        enabled: whether the user has it on.
        is_active: whether it is on and nothing has disabled it for a while.
        is_frozen: whether casts, and what `prepare` returns, may be used again.
        selection: the rows of the batch that it is for; None for all of them.
        attachments: by the path of the layer; empty once it is detached.
    """

    name: str
    recipe: Recipe
    seed: int
    scale: float = 1.0
    uses_base: bool = False
    is_loaded: bool = False
    was_trained: bool = False
    was_told_of_saving: bool = False
    enabled: bool = True
    is_active: bool = True
    is_frozen: bool = False
    selection: RowSelection | None = None
    attachments: "dict[str, Attachment]" = field(default_factory=dict)
    _disabling: set[object] = field(default_factory=set)
    _freezing: set[object] = field(default_factory=set)

    def switch(self, enabled: bool) -> None:
        """Turn it on or off."""
        self.enabled = enabled
        self.is_active = enabled and not self._disabling

    def disable(self, token: object) -> None:
        """Disable it until `end_disable` is called with the same token. Several may overlap."""
        self._disabling.add(token)
        self.is_active = False

    def end_disable(self, token: object) -> None:
        """Undo `disable`."""
        self._disabling.discard(token)
        self.is_active = self.enabled and not self._disabling

    def freeze(self, token: object) -> None:
        """Let `prepare` run once until `end_freeze` is called with the same token."""
        self._freezing.add(token)
        self.is_frozen = True

    def end_freeze(self, token: object) -> None:
        """Undo `freeze`; with the last token go the prepared tensors."""
        self._freezing.discard(token)
        self.is_frozen = bool(self._freezing)
        if not self.is_frozen:
            for attachment in self.attachments.values():
                attachment.prepared.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no context: it is neither disabled nor frozen, and is for all rows."""
        fresh = {"_disabling": set(), "_freezing": set(), "is_frozen": False, "selection": None}
        return {**self.__dict__, **fresh, "is_active": self.enabled}


@dataclass(eq=False)
class Attachment:
    """One adapter on one layer.

    Attributes:
        state: of the adapter.
        layer: where it is.
        variant: for this layer.
        specs: the tensors, by name.
        prepared: the tensors as deltas read them under `frozen()`, by the activation's dtype and
            the scale.
    """

    state: AdapterState
    layer: LayerSpec
    variant: Variant
    specs: Mapping[str, TensorSpec]
    prepared: dict[tuple[torch.dtype, float], dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cls = type(self.variant)
        self.prepares = overrides(cls, "prepare")
        self.has_input_delta = overrides(cls, "delta_input")
        self.has_output_delta = overrides(cls, "delta_output")
        self.shared = frozenset(name for name, spec in self.specs.items() if spec.shared)
        self.keys = {
            name: attribute_of(self.state.name, self.layer, self.variant, name, spec)
            for name, spec in self.specs.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": {}}

    @property
    def methods(self) -> Variant | PerExpert:
        """The variant's methods for this layer."""
        return methods_for(self.variant, self.layer.kind)

    @property
    def adds_to_input(self) -> bool:
        """Whether it is on and changes x."""
        return self.has_input_delta and self.state.is_active

    @property
    def adds_to_output(self) -> bool:
        """Whether it is on and changes y."""
        return self.has_output_delta and self.state.is_active

    def stored(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors as they are stored."""
        return {name: getattr(self.holder(module, name), key) for name, key in self.keys.items()}

    def holder(self, module: nn.Module, name: str) -> nn.Module:
        """The module that keeps a tensor: the layer, or the root for one that layers share."""
        return linked_root(module) if name in self.shared else module

    def input_delta(self, module: nn.Module, x: Tensor) -> Tensor:
        """S Δx, for the layer's input."""
        site = Site(self.layer, module)
        return self.delta_input(site, self._tensors(module, site, x), x)

    def output_delta(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """S Δy, for the layer's output."""
        site = Site(self.layer, module)
        return self.delta_output(site, self._tensors(module, site, y), x, y)

    def add_to_input(self, module: nn.Module, x: Tensor, total: Tensor) -> Tensor:
        """`total`, with s Δx of the layer's input x added: in all rows, or in the adapter's own."""
        selection = self.state.selection
        if selection is None:
            return total + self.input_delta(module, x)
        index = selection.index(x, self.layer.path)
        return total.index_add(0, index, self.input_delta(module, x[index]))

    def add_to_output(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
        total: Tensor,
    ) -> Tensor:
        """`total`, with s Δy added: in all rows, or in the adapter's own.

        Args:
            module: the layer.
            args: that it was called with, after all input deltas.
            kwargs: likewise.
            y: what the base gave for them.
            total: y, and what other adapters have added.
        """
        selection = self.state.selection
        if selection is None:
            return total + self._layout_delta(module, args, kwargs, y)
        if not self.layer.kind.has_matrix:
            selection.refuse_whole(self.layer.path, len(args) + len(kwargs))
        x = layer_input(args, kwargs)
        index = selection.index(x, self.layer.path)
        args, kwargs = with_input(x[index], args, kwargs)
        return total.index_add(0, index, self._layout_delta(module, args, kwargs, y[index]))

    def _layout_delta(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """S Δy, in the layout of the layer's output."""
        kind = self.layer.kind
        y_rows = kind.to_rows(module, y)
        x_rows = kind.rows_of(module, args, kwargs, y_rows)
        return kind.from_rows(module, self.output_delta(module, x_rows, y_rows), y)

    def delta_input(self, site: Site, t: Tensors, x: Tensor) -> Tensor:
        """S Δx, from the tensors as the deltas read them."""
        with _calling(self.variant, "delta_input"):
            if self.variant.takes_scale:
                scaled = cast(ScaledVariant, self.variant)
                delta = scaled.delta_input(site, t, x, scale=self.state.scale)
            else:
                delta = self.variant.delta_input(site, t, x)
        return self._times_scale(checked_delta(self.variant, "delta_input", delta, x))

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """S Δy, from the tensors as the deltas read them."""
        with _calling(self.variant, "delta_output"):
            if self.variant.takes_scale:
                scaled = cast(ScaledVariant, self.variant)
                delta = scaled.delta_output(site, t, x, y, scale=self.state.scale)
            else:
                delta = self.variant.delta_output(site, t, x, y)
        return self._times_scale(checked_delta(self.variant, "delta_output", delta, y))

    def _times_scale(self, delta: Tensor) -> Tensor:
        scale = self.state.scale
        return delta if self.variant.takes_scale or scale == 1.0 else delta * scale

    def _tensors(self, module: nn.Module, site: Site, like: Tensor) -> dict[str, Tensor]:
        """The stored tensors as the deltas read them, and what `prepare` adds to them.

        Under `frozen()` they are the same for every call without gradients; else fresh ones.
        """
        reuse = self.state.is_frozen and not torch.is_grad_enabled()
        key = (like.dtype, self.state.scale)
        if reuse and key in self.prepared:
            return self.prepared[key]
        t = self._cast(module, like)
        if self.prepares:
            t.update(self._prepared(site, t, like))
        if reuse:
            self.prepared[key] = t
        return t

    def _cast(self, module: nn.Module, like: Tensor) -> dict[str, Tensor]:
        at_least_float32 = torch.promote_types(like.dtype, torch.float32)
        t: dict[str, Tensor] = {}
        for name, key in self.keys.items():
            value: Tensor = getattr(self.holder(module, name), key)
            if name in self.shared:
                value = value.to(like.device)
            elif value.device != like.device:
                raise AdapterError(
                    f"tensor {self.keys[name]!r} is on {value.device}, and the activation on "
                    f"{like.device}",
                    fix="Attach or load after the model was moved, or move both: model.to(device)",
                )
            if value.is_floating_point():
                in_float32 = self.specs[name].compute == "float32"
                value = value.to(at_least_float32 if in_float32 else like.dtype)
            t[name] = value
        return t

    def _prepared(self, site: Site, t: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        # Autocast would undo `TensorSpec.compute`.
        with torch.autocast(like.device.type, enabled=False):
            prepared = self._prepare(site, t)
        for name in self.variant.detached:
            prepared[name] = prepared[name].detach()
        return prepared

    def _prepare(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        with _calling(self.variant, "prepare"):
            if self.variant.takes_scale:
                scaled = cast(ScaledVariant, self.variant)
                prepared = scaled.prepare(site, t, scale=self.state.scale)
            else:
                prepared = self.variant.prepare(site, t)
        return checked_prepared(self.variant, prepared, self.specs, "")


def attribute(adapter: str, tensor: str) -> str:
    """The name on its module of an adapter's tensor."""
    return f"lora_{adapter}_{tensor}"


def attribute_of(
    adapter: str, layer: LayerSpec, variant: Variant, name: str, spec: TensorSpec
) -> str:
    """The same for a tensor that a variant declares for a layer."""
    shared = name_on_root(variant.name, spec) if spec.shared else ""
    return attribute(adapter, shared or layer.kind.tensor_name(name))


def _calling(variant: Variant, method: str) -> AbstractContextManager[None]:
    """`calling`, except in what a compiler traces. No path: a delta must not depend on one."""
    return nullcontext() if torch.compiler.is_compiling() else calling(variant, method)
