"""PEFT's implementation of a variant, from the start that ours has.

The row `peft:lora:r=8` is the variant `lora` with these fields, as PEFT computes it: our adapter is
attached, written as PEFT's own type, taken off again, and read and trained by PEFT. So both begin
at the same values, and see the same rows in the same order. What differs between the rows `lora`
and `peft:lora` is the implementation: rounding, time and memory.
"""

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.fields import make_variant
from torch import nn

from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.parts import library_variant
from lora_lite_benchmark.unbounded import Unbounded

__all__ = ["PEFT_PACKAGES", "PeftAdapter", "check_peft"]

PEFT_PACKAGES = ("peft", "lora-lite-peft")


def check_peft(variant: str, fields: Mapping[str, Any]) -> None:
    """Raises BenchmarkError if PEFT is not installed, or does not compute what the variant does."""
    for package in PEFT_PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise BenchmarkError(
                f"the row 'peft:{variant}' needs {package}, which is not installed",
                fix="Run pip install 'lora-lite-benchmark[peft]'",
            )
    from lora_lite_peft import has_native_type

    if not has_native_type(make_variant(library_variant(variant), fields)):
        raise BenchmarkError(
            f"PEFT has no type that computes what {variant!r} does with these fields",
            expected="The README of lora-lite-peft lists, at native=True, what it has a type for",
            fix=f"Leave out the row 'peft:{variant}'",
        )


class PeftAdapter(Unbounded):
    """An adapter of PEFT on a model, with what a run needs of an adapter."""

    macs_per_token = None
    macs_per_forward = None

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @classmethod
    def instead_of(cls, adapter: ll.Adapter, model: nn.Module) -> "PeftAdapter":
        """PEFT's implementation, in the place of `adapter` and with its values."""
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(folder, format="peft", native=True)
            adapter.detach()
            return cls(_read(model, Path(folder), is_trainable=True))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.wrapped.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """One group: PEFT does not say which of its tensors decay would harm."""
        parameters = [parameter for _, parameter in self.named_parameters()]
        return [{"params": parameters, "weight_decay": weight_decay}]

    def disabled(self) -> AbstractContextManager[None]:
        without: AbstractContextManager[None] = self.wrapped.disable_adapter()
        return without

    def save(self, path: Path, *, derived: bool = True) -> None:
        """Write the folder of `path`, which is the file of its tensors."""
        self.wrapped.save_pretrained(str(path.parent), save_embedding_layers=False)

    @staticmethod
    def load(model: nn.Module, path: Path) -> None:
        _read(model, path.parent, is_trainable=False)


def _read(model: nn.Module, folder: Path, is_trainable: bool) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
