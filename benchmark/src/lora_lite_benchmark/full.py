"""The two rows without an adapter: every weight trained, or none.

Both have the methods of an adapter, so that the protocol needs no special cases.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lora_lite.layers import whole
from safetensors.torch import load_model, save_file
from torch import nn

from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.processes import is_main_process
from lora_lite_benchmark.unbounded import Unbounded

__all__ = ["BaseModel", "FullModel"]


class FullModel(Unbounded):
    """Full fine-tuning, the most that an adapter could be expected to learn.

    Weight decay applies to matrices only.
    """

    macs_per_token = 0
    macs_per_forward = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        parameters = list(self.model.parameters())
        return [
            {
                "params": [parameter for parameter in parameters if parameter.ndim > 1],
                "weight_decay": weight_decay,
            },
            {
                "params": [parameter for parameter in parameters if parameter.ndim <= 1],
                "weight_decay": 0.0,
            },
        ]

    def disabled(self) -> AbstractContextManager[None]:
        """Does nothing: nothing was added to the model that could be switched off."""
        return nullcontext()

    def save(self, path: Path, *, derived: bool = True) -> None:
        """Write all weights to one safetensors file, tied ones once. None of them are derived from
        others. Of a model in shards every process calls this, and the main one writes.
        """
        once = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        weights = {
            name: whole(tensor).cpu().contiguous()
            for name, tensor in self.model.state_dict().items()
            if name in once
        }
        if is_main_process():
            write_atomically(path, lambda temporary: save_file(weights, temporary))

    @staticmethod
    def load(model: nn.Module, path: Path) -> None:
        load_model(model, path)


class BaseModel(FullModel):
    """The base as it is. Nothing is trained, so no parameters are counted."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        return 0
