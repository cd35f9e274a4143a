"""One pass of calibration data, streamed to every site's observer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.errors import CalibrationError, bullets
from lora_lite.layers import layer_input
from lora_lite.targets import Placement
from lora_lite.variant import Observer


def calibrate(
    model: nn.Module, placements: Sequence[Placement], batches: Iterable[Any] | None
) -> dict[str, dict[str, Tensor]]:
    """The statistics of every site that observes, after one pass over `batches` in eval mode without gradients.

    A batch is what the model is called with: a mapping (keywords), a tuple or list (positional), or one argument. Rows whose
    `attention_mask` is 0 are dropped. Memory is the observers' own: nothing is kept of a batch.

    Raises:
        CalibrationError: data is missing or superfluous or empty, the model rejects a batch, or a site is never called.
    """
    observed = [
        (p, observer) for p in placements if (observer := p.variant.observe(p.site)) is not None
    ]
    if not observed:
        if batches is not None:
            name = placements[0].variant.name
            raise CalibrationError(
                f"{name} needs no calibration data with these fields; leave calibration= out"
            )
        return {}
    expected = "an iterable of model inputs, such as a DataLoader"
    if batches is None:
        raise CalibrationError(
            f"{observed[0][0].variant} needs calibration data: give calibration= {expected}"
        )
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration= is {describe(batches)}: expected {expected}; of one batch, [batch]"
        )
    calls = _stream(model, observed, batches)
    if silent := [p.spot.path for p, _ in observed if not calls[p.spot.path]]:
        raise CalibrationError(
            f"these sites were never called during calibration:{bullets(silent)}"
        )
    return {p.spot.path: observer.result() for p, observer in observed}


def _stream(
    model: nn.Module, observed: Sequence[tuple[Placement, Observer]], batches: Iterable[Any]
) -> Counter[str]:
    """How often each site was called."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mask: Tensor | None = None
    calls: Counter[str] = Counter()
    count = 0

    def watch(
        path: str,
        observer: Observer,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
    ) -> None:
        calls[path] += 1
        observer.update(_rows(layer_input(args, kwargs), mask), _rows(y, mask))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.enter_context(torch.no_grad())
        for p, observer in observed:
            handle = p.module.register_forward_hook(
                partial(watch, p.spot.path, observer), with_kwargs=True
            )
            stack.callback(handle.remove)
        for count, batch in enumerate(batches, start=1):
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = given.to(device).bool() if isinstance(given, Tensor) else None
            try:
                call(model, batch, device)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise CalibrationError(
                    f"the model rejects calibration batch {count - 1} ({describe(batch)}): {told}"
                ) from error
    if not count:
        raise CalibrationError(
            "calibration= is empty; give at least one batch (an iterator can be used only once)"
        )
    return calls


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, features), without the rows that are padding; `mask` may be of a batch of sequences or of flat tokens."""
    rows = values.detach().reshape(-1, values.shape[-1])
    if mask is not None and values.shape[:-1] in (mask.shape, (mask.numel(),)):
        return rows[mask.reshape(-1)]
    return rows


def call(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """`model(batch)`, with the batch's tensors moved to `device`; a mapping gives keywords, a tuple or list positions."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    return model(*map(move, batch if isinstance(batch, tuple | list) else (batch,)))


def describe(batch: Any) -> str:
    """A batch in a few words, for an error."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {describe(value)}" for key, value in batch.items())
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    return type(batch).__name__
