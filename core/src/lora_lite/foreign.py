"""A path that is not an adapter's file: what a user most likely has there, and what to do.

Formats that plugins read are recognised by their plugins; what is said here is for those that are
not installed.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

# The key of an adapter's own metadata in the header of its file.
OWN_KEY = "lora_lite"
PEFT_CONFIG = "adapter_config.json"
PEFT = "It is an adapter of Hugging Face PEFT. To read it: pip install lora-lite-peft"
GGUF_MAGIC = b"GGUF"
TRAINER_STATE = "trainer_state.json"
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
LONGEST_HEADER = 10_000_000


def explain(path: str | os.PathLike[str]) -> str:
    """One or two sentences, or ""."""
    with suppress(OSError, ValueError):
        found = Path(path)
        return _explain_folder(found) if found.is_dir() else _explain_file(found)
    return ""


def _explain_folder(folder: Path) -> str:
    if (folder / PEFT_CONFIG).exists():
        return PEFT
    if (folder / TRAINER_STATE).exists():
        return (
            "It is a checkpoint of a Trainer. Attach the adapter as it was attached for training, "
            "then load the model's state: trainer.train(resume_from_checkpoint=...)"
        )
    if any((folder / name).exists() for name in MODEL_FILES):
        return (
            "It is a whole model, as save_pretrained writes it. Save an adapter with "
            "adapter.save(path), and load that file"
        )
    files = sorted(entry.name for entry in folder.glob("*.safetensors"))
    return f"Give the path of a file; the folder has {', '.join(files[:5])}" if files else ""


def _explain_file(path: Path) -> str:
    if path.name == "adapter_model.safetensors" or (path.parent / PEFT_CONFIG).exists():
        return PEFT
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "It looks like a pickle of torch.save, which is never read. Use adapter.save(path)"
    if _starts_with(path, GGUF_MAGIC):
        return "It is a GGUF file of llama.cpp, which can be written but not read"
    names = [name for name in _header(path) if name != "__metadata__"]
    if any(name.rpartition(".")[2].startswith("lora_") for name in names):
        return (
            "It is the state of a whole model with an adapter on it. Attach the adapter as it was "
            "attached, then model.load_state_dict(...); adapter.save(path) writes the adapter alone"
        )
    if names:
        return "It holds tensors, but no adapter: is it a model? adapter.save(path) writes adapters"
    return ""


def is_own_file(path: Path) -> bool:
    """Whether a path is a file that names lora-lite in its header, damaged or not."""
    with suppress(OSError, ValueError):
        metadata = _header(path).get("__metadata__") if path.is_file() else None
        return isinstance(metadata, dict) and OWN_KEY in metadata
    return False


def _header(path: Path) -> dict[str, Any]:
    """The header of a file of safetensors; empty if it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= LONGEST_HEADER:
            return {}
        with suppress(ValueError, RecursionError):
            header = json.loads(file.read(length))
            return header if isinstance(header, dict) else {}
    return {}


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
