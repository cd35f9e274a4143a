"""One pass of calibration data, streamed to every site's observer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.errors import CalibrationError, bullets
from lora_lite.layers import layer_input
from lora_lite.targets import Placement
from lora_lite.variant import Observer


def calibrate(model: nn.Module, placements: Sequence[Placement], batches: Iterable[Any] | None) -> dict[str, dict[str, Tensor]]:
    """The statistics of every site that observes, after one pass over `batches` in eval mode without gradients.

    A batch is what the model is called with: a mapping (keywords), a tuple or list (positional), or one argument. Rows whose
    `attention_mask` is 0 are dropped. Memory is the observers' own: nothing is kept of a batch.

    Raises:
        CalibrationError: data is missing or superfluous or empty, the model rejects a batch, or a site is never called.
    """
    observers = {p.spot.path: o for p in placements if (o := p.variant.observe(p.site)) is not None}
    if not observers:
        if batches is not None:
            names = sorted({p.variant.name for p in placements})
            raise CalibrationError(f"{', '.join(names)} needs no calibration data with these fields; leave calibration= out")
        return {}
    if batches is None:
        examples = next(p.variant for p in placements if p.spot.path in observers)
        raise CalibrationError(
            f"{examples} needs calibration data: give calibration= an iterable of model inputs, such as a DataLoader"
        )
    if isinstance(batches, Mapping | Tensor):
        raise CalibrationError("calibration= is one batch, not several; give calibration=[batch]")
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"calibration={batches!r}: expected an iterable of model inputs, such as a DataLoader")
    watchers = [_Watcher(p, observers[p.spot.path]) for p in placements if p.spot.path in observers]
    _stream(model, watchers, batches)
    silent = [watcher.path for watcher in watchers if not watcher.calls]
    if silent:
        raise CalibrationError(f"these sites were never called during calibration:{bullets(silent)}")
    return {watcher.path: watcher.observer.result() for watcher in watchers}


class _Watcher:
    """Feeds one site's observer from a forward hook."""

    def __init__(self, placement: Placement, observer: Observer) -> None:
        self.path = placement.spot.path
        self.module = placement.module
        self.observer = observer
        self.calls = 0
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        self.calls += 1
        self.observer.update(self._rows(layer_input(args, kwargs)), self._rows(y))

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.detach().reshape(-1, values.shape[-1])
        if self.mask is not None and values.shape[:-1] in (self.mask.shape, (self.mask.numel(),)):  # also as flat tokens
            return rows[self.mask.reshape(-1)]
        return rows


def _stream(model: nn.Module, watchers: Sequence[_Watcher], batches: Iterable[Any]) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for watcher in watchers:
            handle = watcher.module.register_forward_hook(watcher, with_kwargs=True)
            stack.callback(handle.remove)
        for count, batch in enumerate(batches, start=1):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for watcher in watchers:
                watcher.mask = mask.to(device).bool() if isinstance(mask, Tensor) else None
            try:
                call(model, batch, device)
            except Exception as error:
                raise CalibrationError(
                    f"the model rejects calibration batch {count - 1} ({describe(batch)}): {type(error).__name__}: {error}"
                ) from error
    if not count:
        raise CalibrationError("calibration= is empty; give at least one batch (an iterator can be used only once)")


def call(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """`model(batch)`, with the batch's tensors moved to `device`; a mapping gives keywords, a tuple or list positions."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return model(*map(move, batch))
    return model(move(batch))


def describe(batch: Any) -> str:
    """A batch in a few words, for an error."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {describe(value)}" for key, value in batch.items())
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    return type(batch).__name__


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, every module's own training flag restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
