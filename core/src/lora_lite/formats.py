"""Other ways to keep an adapter than lora-lite's own file: folders of other libraries, checkpoints.

A format is a class that a distribution names in the entry-point group `lora_lite.formats`, under
its `name`. It is imported when an adapter is saved in it, or when `load` meets a path that is not a
file of lora-lite's own.

A format touches no model. To write, it is given the adapter; to read, it returns the variant and
the tensors of each layer, and the core attaches them, all or nothing.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lora_lite.errors import AdapterError, AdapterFileError, did_you_mean
from lora_lite.hookspecs import hookimpl
from lora_lite.variant import Variant

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter
    from lora_lite.base import Base


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter that was read from another format.

    Attributes:
        variants: the variant of each layer, by its path.
        tensors: the stored tensors of each layer, by path and name; derived ones may be left out.
        scale: of the adapter.
    """

    variants: Mapping[str, Variant]
    tensors: Mapping[str, Mapping[str, Tensor]]
    scale: float = 1.0


class Format(ABC):
    """A way to keep an adapter. Subclass it and write `recognises`, and `write` or `read` or both.

    The keyword-only parameters of `write` are the options that `adapter.save(..., format=...)`
    takes.

    Attributes:
        name: what `format=` is given.
        linear_layers_only: whether it has no place for adapters on embeddings, convolutions, the
            experts of a mixture and whole modules, which are then refused before `write`.
    """

    name: ClassVar[str] = ""
    linear_layers_only: ClassVar[bool] = True

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this format. It is asked about any path, and reads little.

        It returns False for what it cannot read.
        """

    def write(self, adapter: Adapter, base: Base, path: Path) -> None:
        """Write an adapter, all or nothing.

        Raises:
            AdapterError: the format has no place for this adapter.
            AdapterFileError: the path cannot be written.
        """
        raise AdapterError(f"format {self.name!r} can only be read", adapter=adapter.name)

    def read(self, path: Path, base: Base) -> ForeignAdapter:
        """Read an adapter.

        Raises:
            AdapterFileError: it cannot be read, does not fit the model, or holds something that an
                adapter of lora-lite cannot.
        """
        raise AdapterFileError(f"{path}: format {self.name!r} can only be written", path=str(path))

    def describe(self, path: Path) -> str:
        """What a path of this format holds, in lines, without a model.

        Raises:
            AdapterFileError: it cannot be read, or the format does not say.
        """
        raise AdapterFileError(
            f"{path}: format {self.name!r} does not say what it holds", path=str(path)
        )

    @hookimpl
    def lora_lite_format(self, name: str) -> Format | None:
        """Answers pluggy: this format, if it goes by `name`."""
        return self if type(self).name == name else None


def refuse_other_layers(chosen: Format, adapter: Adapter) -> None:
    """An error for layers that a format has no place for."""
    if not chosen.linear_layers_only:
        return
    attachments = adapter._state.attachments
    others = [path for path, each in attachments.items() if not each.layer.kind.default]
    if others:
        raise AdapterError(
            f"format {chosen.name!r} has a place for linear layers alone, and adapter "
            f"{adapter.name!r} is also on",
            details=others,
            expected="Embeddings, convolutions, experts and whole modules are no linear layers",
            fix="format='merged' takes them all; adapter.save(path) keeps them as they are",
            adapter=adapter.name,
            layer=others[0],
        )


def refuse_unknown_options(chosen: Format, options: Mapping[str, Any]) -> None:
    """An error for options that the `write` of a format does not take."""
    parameters = inspect.signature(chosen.write).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in options if option not in known]
    if unknown:
        has = f"Its options are {', '.join(known)}" if known else "It has no options"
        raise AdapterFileError(
            f"format {chosen.name!r} does not take {', '.join(map(repr, unknown))}",
            expected=has,
            fix=did_you_mean(unknown[0], known),
        )
