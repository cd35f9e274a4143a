"""An adapter on the experts of a mixture: its deltas for the rows of one expert, or of many.

Rows of many experts are computed at once where the variant's deltas can be (`ragged`), else expert
by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.attachment import Attachment
from lora_lite.experts import ExpertStack, GivenWeight
from lora_lite.layers import LayerKind
from lora_lite.per_expert import expert_spec
from lora_lite.ragged import Groups, NotRaggedError, Ragged
from lora_lite.site import LayerSpec, Site
from lora_lite.variant import Tensors


class ExpertAttachment(Attachment):
    """One adapter on one stack of experts. Its tensors are (experts, ...).

    Attributes:
        was_read: whether a stand-in for the parameter was multiplied. Not kept under compile.
    """

    was_read = False

    @property
    def stack(self) -> ExpertStack:
        """Which parameter it is on."""
        kind = self.layer.kind
        assert isinstance(kind, ExpertStack)
        return kind

    @property
    def adds_to_input(self) -> bool:
        """False: x is not what the module is called with."""
        return False

    @property
    def adds_to_output(self) -> bool:
        """False: y is not what the module returns."""
        return False

    def _prepare(self, site: Site, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `prepare` gives for each expert, stacked: for all at once, if it can be traced."""
        module, weights = site._module, self.stack.stacked(site._module)

        def of_one(weight: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
            layer = LayerSpec(site.path, GivenWeight(weight), site.d_in, site.d_out, has_bias=False)
            return Attachment._prepare(self, Site(layer, module), own)

        try:
            return torch.vmap(of_one)(weights, t)
        except RuntimeError:  # an operation that vmap does not know, or a look at values
            apart = [{name: each[e] for name, each in t.items()} for e in range(len(weights))]
            each = [of_one(weight, own) for weight, own in zip(weights, apart, strict=True)]
            return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def attachment_class(kind: LayerKind) -> type[Attachment]:
    """What an adapter is on a layer of this kind."""
    return ExpertAttachment if isinstance(kind, ExpertStack) else Attachment


class ExpertRun:
    """One adapter on one stack of experts, during one forward."""

    def __init__(self, attachment: ExpertAttachment, module: nn.Module) -> None:
        self.attachment = attachment
        self.module = module
        self.experts = attachment.layer.kind.count(module)
        self._stacked: dict[torch.dtype, dict[str, Tensor]] = {}
        self._apart: dict[torch.dtype, dict[str, Sequence[Tensor]]] = {}

    def input_delta(self, x: Tensor, which: int | Groups) -> Tensor | None:
        """S Δx, or None if the variant does not change x."""
        if not self.attachment.has_input_delta:
            return None
        return self._delta(which, x, None)

    def output_delta(self, x: Tensor, y: Tensor, which: int | Groups) -> Tensor | None:
        """S Δy, or None if the variant does not change y."""
        if not self.attachment.has_output_delta:
            return None
        return self._delta(which, x, y)

    def _delta(self, which: int | Groups, x: Tensor, y: Tensor | None) -> Tensor:
        if isinstance(which, int):
            return self._of_one(which, x, y)
        try:
            return self._of_all(which, x, y)
        except NotRaggedError:
            return self._in_a_loop(which, x, y)

    def _of_one(self, expert: int, x: Tensor, y: Tensor | None) -> Tensor:
        t = {name: each[expert] for name, each in self._tensors_apart(x if y is None else y)}
        site = Site(expert_spec(self.attachment.layer, expert), self.module)
        return self._call(site, t, x, y)

    def _of_all(self, groups: Groups, x: Tensor, y: Tensor | None) -> Tensor:
        stacked = self._tensors(x if y is None else y)
        t: dict[str, Any] = {name: Ragged(each, groups) for name, each in stacked.items()}
        layer = self.attachment.layer
        kind = NoOneWeight()
        site = Site(LayerSpec("", kind, layer.d_in, layer.d_out, has_bias=False), self.module)
        return self._call(site, t, x, y)

    def _call(self, site: Site, t: Tensors, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return self.attachment.delta_input(site, t, x)
        return self.attachment.delta_output(site, t, x, y)

    def _in_a_loop(self, groups: Groups, x: Tensor, y: Tensor | None) -> Tensor:
        parts = [
            self._of_one(expert, x[rows], None if y is None else y[rows])
            for expert, rows in groups.slices()
        ]
        like = x if y is None else y
        rest = like.new_zeros(len(like) - sum(map(len, parts)), like.shape[1])
        return torch.cat([*parts, rest])

    def _tensors(self, like: Tensor) -> dict[str, Tensor]:
        """The stored and the prepared tensors, as deltas read them; once a forward."""
        if like.dtype not in self._stacked:
            site = Site(self.attachment.layer, self.module)
            self._stacked[like.dtype] = self.attachment._tensors(self.module, site, like)
        return self._stacked[like.dtype]

    def _tensors_apart(self, like: Tensor) -> Sequence[tuple[str, Sequence[Tensor]]]:
        """Those of every expert. Indexing would give each its own gradient of the stack's size."""
        if like.dtype not in self._apart:
            stacked = self._tensors(like)
            self._apart[like.dtype] = {name: each.unbind() for name, each in stacked.items()}
        return list(self._apart[like.dtype].items())


class NoOneWeight(LayerKind):
    """The layer of a delta for all experts at once, whose weight there is no asking for."""

    def matches(self, module: nn.Module) -> bool:
        return False

    def weight(self, module: nn.Module) -> Tensor:
        raise NotRaggedError("site.weight()")

    def dtype(self, module: nn.Module) -> torch.dtype:
        raise NotRaggedError("site.dtype")

    def bias(self, module: nn.Module) -> Tensor | None:
        """None: a bias of the experts is added to y after the adapters."""
        return None
