"""A variant's methods for a stack of experts: those of one expert, expert by expert.

The variant knows nothing of it. Its shapes and values are those of one expert, named `path[e]`; the
stack's tensors are (experts, ...).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lite.errors import SiteError
from lora_lite.experts import ExpertStack, OneExpert
from lora_lite.layers import LayerKind
from lora_lite.site import LayerSpec, Site
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import Rng, Tensors, Variant, overrides


class PerExpert:
    """The methods of a variant that the core calls outside of a forward, for a stack of experts.

    Each is the method of `Variant` of the same name; `site` is the stack.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        first = _expert(site, 0)
        specs = self.variant.tensors(first)
        if self.variant.observe(first) is not None:
            raise SiteError(
                "variant",
                "it needs calibration data of every expert, which is not gathered; choose fields "
                "that need none",
            )
        shared = [spec.shared for spec in specs.values() if spec.shared]
        if shared:
            raise SiteError(
                "variant", f"all layers share its tensor {shared[0]!r}, and experts can share none"
            )
        count = _count(site)
        return {name: replace(spec, shape=(count, *spec.shape)) for name, spec in specs.items()}

    def derive(self, site: Site) -> dict[str, Tensor]:
        return _stacked(map(self.variant.derive, _experts(site)))

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        def start(index: int, expert: Site) -> dict[str, Tensor]:
            own = partial(_named_apart, rng, index)
            return self.variant.init(expert, _of_one(derived, index), statistics, own)

        return _stacked(start(index, expert) for index, expert in enumerate(_experts(site)))

    def project(self, site: Site, t: Tensors) -> None:
        if overrides(type(self.variant), "project"):
            for index, expert in enumerate(_experts(site)):
                self.variant.project(expert, _of_one(t, index))

    def penalty(self, site: Site, t: Tensors) -> Tensor | None:
        if not overrides(type(self.variant), "penalty"):
            return None
        apart = {name: tensor.unbind() for name, tensor in t.items()}
        penalties = [
            self.variant.penalty(expert, {name: each[index] for name, each in apart.items()})
            for index, expert in enumerate(_experts(site))
        ]
        given = [penalty for penalty in penalties if penalty is not None]
        return torch.stack(given).sum() if given else None

    def state_dict(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return self._each(site, t, self.variant.state_dict)

    def load_state_dict(self, site: Site, saved: Tensors) -> dict[str, Tensor]:
        return self._each(site, saved, self.variant.load_state_dict)

    def macs_per_token(self, site: Site) -> int:
        kind = site._layer.kind
        assert isinstance(kind, ExpertStack)
        return kind.chosen(site._module) * self.variant.macs_per_token(_expert(site, 0))

    def macs_per_forward(self, site: Site) -> int:
        return _count(site) * self.variant.macs_per_forward(_expert(site, 0))

    def _each(
        self, site: Site, t: Tensors, method: Callable[[Site, Tensors], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return _stacked(
            method(expert, _of_one(t, index)) for index, expert in enumerate(_experts(site))
        )


def methods_for(variant: Variant, kind: LayerKind) -> Variant | PerExpert:
    """What to call outside of a forward: the variant, or what calls it for each expert."""
    return PerExpert(variant) if isinstance(kind, ExpertStack) else variant


def variant_of(methods: Variant | PerExpert) -> Variant:
    """The inverse of `methods_for`."""
    return methods.variant if isinstance(methods, PerExpert) else methods


def expert_spec(layer: LayerSpec, index: int) -> LayerSpec:
    """One expert of a stack as a layer of its own."""
    assert isinstance(layer.kind, ExpertStack)
    path = f"{layer.path}[{index}]"
    return LayerSpec(path, OneExpert(layer.kind, index), layer.d_in, layer.d_out, has_bias=False)


def _expert(site: Site, index: int) -> Site:
    return _Watched(site, index)


def _experts(site: Site) -> Iterable[Site]:
    return (_expert(site, index) for index in range(_count(site)))


def _count(site: Site) -> int:
    return site._layer.kind.count(site._module)


class _Watched(Site):
    """The site of one expert, which tells that of the stack when the weight is read."""

    __slots__ = ("_stack",)

    def __init__(self, stack: Site, index: int) -> None:
        self._stack = stack
        super().__init__(expert_spec(stack._layer, index), stack._module)

    def weight(self) -> Tensor:
        self._stack.weight_was_read = True
        return super().weight()

    def matmul(self, m: Tensor) -> Tensor:
        self._stack.weight_was_read = True
        return super().matmul(m)


def _named_apart(rng: Rng, index: int, tensor: str) -> torch.Generator:
    """Random numbers of one expert's own."""
    return rng(f"{index}/{tensor}")


def _of_one(t: Tensors, index: int) -> dict[str, Any]:
    return {name: tensor[index] for name, tensor in t.items()}


def _stacked(each: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name: (experts, ...)} of what a method gave for each expert."""
    given = list(each)
    return {name: torch.stack([one[name] for one in given]) for name in given[0]}
