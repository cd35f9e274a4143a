"""The format "gguf": a LoRA for llama.cpp and Ollama, of any method whose change is of low rank.

    blk.0.attn_q.weight.lora_a (r, d_in),  blk.0.attn_q.weight.lora_b (d_out, r)     in float32

llama.cpp scales by alpha / r, and by 1 where alpha is 0. It is 0 here, and the scale is in B, since
the layers may have different ranks.
"""

import os
import secrets
from pathlib import Path
from typing import ClassVar

import gguf
import torch
from lora_lite import Adapter, AdapterError, AdapterFileError
from lora_lite.author import Base, Format
from lora_lite.low_rank import low_rank
from lora_lite.progress import Tell, told
from lora_lite.warn import warn
from torch import Tensor
from torch.nn.functional import pad

from lora_lite_gguf.architectures import Architecture, architecture_of


class Gguf(Format):
    """A GGUF file with a LoRA. It is written only."""

    name: ClassVar[str] = "gguf"

    def recognises(self, path: Path) -> bool:
        return False

    def write(
        self,
        adapter: Adapter,
        base: Base,
        path: Path,
        *,
        rank: int | None = None,
        tell: Tell | None = None,
    ) -> None:
        """Write a file.

        Args:
            adapter: at its present scale.
            base: its model, of a type that llama.cpp's converter is known to handle.
            path: of the file.
            rank: the largest rank to write; a change of higher rank is truncated, with a warning
                that says how much is lost. None writes exact factors, or refuses.
            tell: is given lines of progress.

        Raises:
            AdapterError: a change is of full rank, shifts an output, or is at a layer that the
                converted base does not have.
        """
        architecture = architecture_of(base.root)
        tensors = _tensors(adapter, architecture, rank, tell)
        unfinished = path.parent / f".{secrets.token_hex(8)}.tmp"
        try:
            _write(unfinished, architecture.name, tensors)
            _refuse_incomplete(unfinished, path, tensors)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def _tensors(
    adapter: Adapter, architecture: Architecture, rank: int | None, tell: Tell | None
) -> dict[str, Tensor]:
    """The factors by GGUF's names."""
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    changes = told(adapter._changes(), len(adapter.sites), tell)
    for path, factors in low_rank(changes, rank).items():
        if factors.offset is not None:
            raise AdapterError(
                f"{path}: the adapter shifts the output by a constant",
                expected="A LoRA in GGUF has no place for that",
                fix='Write format="merged" and convert the whole checkpoint',
                layer=path,
            )
        name = _name(path, architecture)
        missing = 1 if factors.rank == 0 else 0  # a tensor cannot be empty
        b = architecture.arranged(path, factors.B)
        tensors[f"{name}.lora_a"] = pad(factors.A, (0, 0, 0, missing)).float()
        tensors[f"{name}.lora_b"] = pad(b, (0, missing)).float()
        if factors.error:
            lost[path] = factors.error
    if lost:
        warn(
            f"the change of {len(lost)} layers was truncated",
            [f"{path}: {error:.2g} of its size is lost" for path, error in lost.items()],
            "A higher rank= loses less",
        )
    return tensors


def _name(path: str, architecture: Architecture) -> str:
    """The name of a layer's weight in the converted base."""
    name = architecture.tensor_name(f"{path}.weight")
    if name is None:
        raise AdapterError(
            f"llama.cpp has no weight for {path} in a model of its type {architecture.name!r}",
            fix="Attach to the projections of attention and feed-forward network",
            layer=path,
        )
    if name == "output.weight" and getattr(architecture.config, "tie_word_embeddings", False):
        raise AdapterError(
            f"{path} is tied to the embeddings, and the converted base has no weight for it",
            fix='Leave the output head out, or write format="merged"',
            layer=path,
        )
    return name


def _write(path: Path, architecture: str, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _refuse_incomplete(written: Path, path: Path, tensors: dict[str, Tensor]) -> None:
    """An error if a file does not hold what was written to it.

    The package gguf writes by numpy, which passes over a disk that is full.

    Args:
        written: the file.
        path: where it is to go.
        tensors: that it should hold.

    Raises:
        AdapterFileError: it does not.
    """
    try:
        found = {each.name: torch.tensor(each.data) for each in gguf.GGUFReader(written).tensors}
    except (ValueError, IndexError, OverflowError):
        found = {}
    same = (torch.equal(found[name], t.cpu()) for name, t in tensors.items() if name in found)
    if found.keys() != tensors.keys() or not all(same):
        raise AdapterFileError(
            f"{path} cannot be written: what was written is incomplete",
            fix="Is the disk full?",
            path=str(path),
        )
