"""A batch whose rows use different adapters.

An adapter computes its deltas for its own rows alone, and adds them there. What a layer gets must
therefore have the batch's rows as its first dimension; anything else is an error that names the
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from lora_lite.attaching import adapters
from lora_lite.attachment import AdapterState
from lora_lite.errors import AdapterError, did_you_mean
from lora_lite.row_selection import RowSelection


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Run batches whose rows use different adapters: row i that of `names[i]`.

    Each row comes out as it does with its own adapter alone. Adapters that no row names are off
    meanwhile. It is for all threads alike. Under gradient checkpointing, call `backward` inside.

    Args:
        model: with its adapters.
        names: one for each row of the batch; None for the base. `generate` with beams or several
            sequences repeats every row: repeat its name as often.

    Raises:
        AdapterError: a name that no adapter has, an adapter that is switched off, one context
            inside another. Inside: a layer gets something whose rows are not the batch's.
    """
    states = {name: adapter._attached() for name, adapter in adapters(model).items()}
    _refuse_bad_names(names, states)
    with ExitStack() as stack:
        for name, state in states.items():
            rows = tuple(row for row, chosen in enumerate(names) if chosen == name)
            if rows:
                stack.callback(setattr, state, "selection", None)
                state.selection = RowSelection(rows, len(names))
            else:
                token = object()
                stack.callback(state.end_disable, token)
                state.disable(token)
        yield


def _refuse_bad_names(names: object, states: Mapping[str, AdapterState]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(
            f"names={names!r} gives no row an adapter",
            expected="It is a list with the name of an adapter, or None, for each row",
        )
    for name in names:
        if name is not None and (not isinstance(name, str) or name not in states):
            raise AdapterError(
                f"the model has no adapter named {name!r}",
                expected=f"It has: {', '.join(sorted(states)) or 'none'}",
                fix=did_you_mean(str(name), states),
                adapter=str(name),
            )
    for name, state in states.items():
        if state.selection is not None:
            raise AdapterError(
                "rows have their adapters already", fix="Leave the outer adapters_by_row first"
            )
        if name in names and not state.is_active:
            raise AdapterError(
                f"adapter {name!r} is switched off, and rows use it",
                fix="Enable it, or leave disabled()",
                adapter=name,
            )
