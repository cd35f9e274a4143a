"""How an adapter reaches experts that no module computes: a stand-in for their parameter.

Before every forward of the module, an object is put where its forward looks the parameter up
(`module.__dict__`, which Python asks before `nn.Module.__getattr__` finds the parameter), and taken
away after it. Whatever multiplies rows with it, or with a part of it, adds the deltas of the rows'
own experts:

    x' = x + Σ s Δx_e(x),        y' = W_e x' + Σ s Δy_e(x', W_e x')

It is understood in the ways in which transformers computes experts: one by one (`eager`), a copy of
the matrix for each row (`batched_mm`), and `grouped_mm`. Any other use is an error. Parameters,
buffers and the state dict are never touched, and nothing of the weight's size is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_lite.errors import AdapterError
from lora_lite.expert_attachment import ExpertAttachment, ExpertRun
from lora_lite.hooks import LayerHooks
from lora_lite.ragged import LINEAR, MATMUL, Groups

BMM = (torch.bmm, Tensor.bmm)
# The ways to compute experts that go through these products, as transformers calls them.
WAYS = ("eager", "batched_mm", "grouped_mm")
# What a forward may ask of a parameter beside products.
READ = (
    *("device", "dtype", "layout", "requires_grad", "is_cuda", "is_floating_point"),
    *("shape", "size", "dim", "ndim", "numel", "element_size"),
    *("stride", "is_contiguous", "data_ptr"),
)


class StandIn:
    """A stack of expert matrices, or a part of it, seen through the adapters.

    Args:
        runs: of the adapters that are on, in their order.
        weights: the parameter, or an index or a transpose of it.
        picked: the indices of the experts in `weights`: None for all of them, one index, or one for
            each row.
    """

    def __init__(self, runs: Sequence[ExpertRun], weights: Tensor, picked: Any = None) -> None:
        self._runs = runs
        self._weights = weights
        self._picked = picked

    def __getattr__(self, name: str) -> Any:
        if name not in READ:
            raise _not_understood(f".{name}")
        return getattr(self._weights, name)

    def __getitem__(self, index: Any) -> StandIn:
        if self._picked is not None or not isinstance(index, int | Tensor):
            raise _not_understood(f"[{index}]")
        return StandIn(self._runs, self._weights[index], index)

    def __len__(self) -> int:
        return len(self._weights)

    def transpose(self, first: int, second: int) -> StandIn:
        """Of the last two dimensions."""
        last = {self._weights.ndim - 2, self._weights.ndim - 1}
        if {first % self._weights.ndim, second % self._weights.ndim} != last:
            raise _not_understood(f".transpose({first}, {second})")
        return StandIn(self._runs, self._weights.mT, self._picked)

    @property
    def T(self) -> StandIn:  # noqa: N802 (as tensors call it)
        return self.transpose(-2, -1)

    mT = T  # noqa: N815 (as tensors call it)

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        return StandIn(self._runs, self._weights.to(*args, **kwargs), self._picked)

    def contiguous(self) -> StandIn:
        return self

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self._times(x, lambda rows: rows @ self._weights, self._which())

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in LINEAR:
            return _linear(*args, **kwargs)
        if func in MATMUL and isinstance(args[1], StandIn):
            return args[1].__rmatmul__(args[0])
        if func in BMM:
            return _bmm(*args, **kwargs)
        if "grouped_mm" in str(func):
            return _grouped(func, *args, **kwargs)
        raise _not_understood(f" in {func}")

    def _which(self) -> int:
        """The one expert that was picked."""
        picked = self._picked
        if isinstance(picked, Tensor) and picked.ndim == 0:
            return int(picked)
        if isinstance(picked, int):
            return picked
        raise _not_understood(" in a product of matrices for all experts")

    def _times(self, x: Tensor, base: Callable[[Tensor], Tensor], which: int | Groups) -> Tensor:
        """What the base gives for rows x, and the deltas. `which` expert, or which for each row."""
        for run in self._runs:
            if not torch.compiler.is_compiling():
                run.attachment.was_read = True
        changes = [run.input_delta(x, which) for run in self._runs]
        x = sum((each for each in changes if each is not None), start=x)
        y = base(x)
        changes = [run.output_delta(x, y, which) for run in self._runs]
        return sum((each for each in changes if each is not None), start=y)


# --- the products


def _linear(x: Tensor, weight: StandIn, bias: Tensor | None = None) -> Tensor:
    y = weight._times(x, lambda rows: linear(rows, weight._weights), weight._which())
    return y if bias is None else y + bias


def _bmm(first: Any, second: Any) -> Tensor:
    """One product for each row: W_e x as (rows, d_out, d_in) (rows, d_in, 1), or x W_e."""
    if isinstance(first, StandIn):
        weight, x, axis = first, second, -1
    else:
        weight, x, axis = second, first, 1
    ids = weight._picked
    if ids is None and axis == 1:
        return _bmm_of_all(x, weight)
    if not isinstance(ids, Tensor) or ids.ndim != 1 or x.shape[axis] != 1:
        raise _not_understood(" in a product for all experts at once")
    order = ids.argsort()
    groups = _groups_of(ids[order], weight._runs[0].experts)
    weights = weight._weights[order]

    def base(rows: Tensor) -> Tensor:
        if axis == 1:
            return torch.bmm(rows.unsqueeze(1), weights).squeeze(1)
        return torch.bmm(weights, rows.unsqueeze(-1)).squeeze(-1)

    y = weight._times(x.squeeze(axis)[order], base, groups)
    return y[order.argsort()].unsqueeze(axis)


def _bmm_of_all(x: Tensor, weight: StandIn) -> Tensor:
    """As many rows for every expert: (experts, rows, d_in) (experts, d_in, d_out)."""
    experts, rows, _ = x.shape
    numbers = torch.arange(experts, device=x.device)
    groups = Groups(numbers.repeat_interleave(rows), (rows * (numbers + 1)).int())

    def base(flat: Tensor) -> Tensor:
        return torch.bmm(flat.reshape(experts, rows, -1), weight._weights).flatten(0, 1)

    return weight._times(x.flatten(0, 1), base, groups).reshape(experts, rows, -1)


def _grouped(
    func: Callable[..., Tensor], x: Tensor, weight: StandIn, *args: Any, **kwargs: Any
) -> Tensor:
    """Rows that are sorted by expert."""
    ends = args[0] if args else kwargs["offs"]
    rows = torch.arange(len(x), device=x.device)
    ids = torch.bucketize(rows, ends, right=True).clamp(max=len(ends) - 1)
    groups = Groups(ids, ends)
    return weight._times(x, lambda rows: func(rows, weight._weights, *args, **kwargs), groups)


def _groups_of(ids: Tensor, experts: int) -> Groups:
    """The groups of sorted indices."""
    numbers = torch.arange(experts, device=ids.device)
    return Groups(ids, torch.searchsorted(ids.contiguous(), numbers, right=True).int())


def _not_understood(use: str) -> AdapterError:
    return AdapterError(
        f"the model uses the experts' weights in a way that adapters do not know: {use.strip()}",
        expected="Experts are computed by transformers' eager, batched_mm or grouped_mm",
        fix="Choose one: model.set_experts_implementation('grouped_mm'); or leave the experts out "
        "with exclude=",
    )


# --- before and after a forward of the module


def _refuse_other_ways(module: nn.Module) -> None:
    """An error for kernels that would read the parameter past the stand-in."""
    way = getattr(module.__dict__.get("config"), "_experts_implementation", None)
    if way is not None and way not in WAYS:
        raise AdapterError(
            f"the experts are computed by {way!r}, which an adapter on them cannot change",
            expected=f"Known are {', '.join(WAYS)}",
            fix="model.set_experts_implementation('grouped_mm'); or leave the experts out with "
            "exclude=",
        )
    if module.__dict__.get("_is_expert_parallel", False):
        raise AdapterError(
            "these experts are spread over processes (expert parallelism)",
            fix="Load the model without it, or leave the experts out with exclude=",
        )


class ExpertHooks(LayerHooks):
    """The hooks of a module that holds experts: stand-ins before its forward, and none after it."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: puts a stand-in for every parameter that an adapter is on."""
        found = super().before(module, args, kwargs)
        self._put(module)
        return found

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        """The forward hook: takes them away, also if the forward has failed and y is None."""
        self.leave(module)
        return None if y is None else super().after(module, args, kwargs, y)

    def leave(self, module: nn.Module) -> None:
        """Take the stand-ins away. It may be called again."""
        for attachment in self.attachments:
            if isinstance(attachment, ExpertAttachment):
                module.__dict__.pop(attachment.stack.parameter, None)

    def _put(self, module: nn.Module) -> None:
        runs: dict[str, list[ExpertRun]] = {}
        for attachment in self.attachments:
            if isinstance(attachment, ExpertAttachment) and attachment.state.is_active:
                run = ExpertRun(attachment, module)
                runs.setdefault(attachment.stack.parameter, []).append(run)
        if runs:
            _refuse_other_ways(module)
        by_row = [r for of in runs.values() for r in of if r.attachment.state.selection is not None]
        if by_row:
            layer = by_row[0].attachment.layer.path
            raise AdapterError(
                f"{layer} holds experts, which get rows that a router has chosen",
                expected="Inside adapters_by_row, every layer gets the batch's rows",
                fix="Run the rows one after the other, or attach without the experts",
                layer=layer,
            )
        for name, of_parameter in runs.items():
            weights = module._parameters[name]
            assert weights is not None
            module.__dict__[name] = StandIn(of_parameter, weights)
