"""The rows of a batch that an adapter is for, inside `adapters_by_row`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.errors import AdapterError


@dataclass(frozen=True)
class RowSelection:
    """Some rows of a batch.

    Attributes:
        rows: their numbers.
        batch: how many rows the batch has.
    """

    rows: tuple[int, ...]
    batch: int

    def refuse_whole(self, layer: str, arguments: int) -> None:
        """An error for a whole module that is called with more than x.

        Raises:
            AdapterError: which of the arguments have a row for each of the batch is not known.
        """
        if arguments > 1:
            raise _refusal(f"{layer} is called with {arguments} arguments", layer)

    def index(self, value: object, layer: str) -> Tensor:
        """The rows as an index into the first dimension of what a layer gets.

        Raises:
            AdapterError: its first dimension is not the batch's rows.
        """
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != self.batch:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise _refusal(
                f"{layer} gets {shape}, and {self.batch} rows have an adapter each", layer
            )
        if value.ndim == 2 and "expert" in layer:
            raise _refusal(f"{layer} gets rows that a router has chosen", layer)
        return torch.tensor(self.rows, device=value.device)


def _refusal(problem: str, layer: str) -> AdapterError:
    return AdapterError(
        problem,
        expected="Inside adapters_by_row, the first dimension is the batch: one name for each row, "
        "as often as generate repeats it for beams or several sequences",
        fix="Run the rows one after the other, or attach without this layer",
        layer=layer,
    )
