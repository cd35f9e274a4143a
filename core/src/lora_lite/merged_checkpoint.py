"""The format "merged": a whole checkpoint with the adapter's change added, for everything else.

    adapter.save("folder", format="merged")
    AutoModelForCausalLM.from_pretrained("folder")        needs nothing of lora-lite

W + ΔW is computed in float64 and rounded once, to the dtype of the base. In bfloat16 that rounding
may be larger than a small change: half a unit of the last of its 8 bits.

The model in memory is not touched. Shards are written one after the other, so that the memory that
is needed beside the model is about one shard. The folder is filled under another name and renamed
when it is whole.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.base import Base
from lora_lite.formats import Format
from lora_lite.new_folder import new_folder
from lora_lite.plain_contents import Contents, Entry, plain_contents
from lora_lite.warn import warn

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

# What belongs to a checkpoint beside weights and config, by the ends and starts of file names.
COMPANION_STARTS = (
    "added_tokens",
    "chat_template",
    "merges",
    "preprocessor_config",
    "processor_config",
    "special_tokens",
    "spiece",
    "tokenizer",
    "vocab",
)
COMPANION_ENDS = (".model", ".tiktoken", ".jinja", ".py")


class MergedCheckpoint(Format):
    """A plain checkpoint. It is written only; to read it is to load a model."""

    name: ClassVar[str] = "merged"
    linear_layers_only: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return False

    def write(
        self,
        adapter: Adapter,
        base: Base,
        path: Path,
        *,
        base_folder: str | os.PathLike[str] | None = None,
        dequantise: bool = False,
        shard_bytes: int = SHARD_BYTES,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Write a folder.

        Args:
            adapter: at its present scale. Other adapters on the model are left out.
            base: its model.
            path: of the folder, which must not be there yet, or be empty.
            base_folder: where tokenizer and the like are copied from. By default that from which
                the model was loaded, if it is known.
            dequantise: whether to write the weights of a quantised base as plain ones. The
                checkpoint is then as large as an unquantised one.
            shard_bytes: the largest size of one file.
            tell: is given a line for each file.

        Raises:
            AdapterError: the base is quantised and `dequantise` is not set; or a layer without a
                bias would need one.
            AdapterFileError: the folder is there already, or cannot be written.
        """
        with new_folder(path) as folder:
            contents = plain_contents(base.root, adapter, dequantise)
            _write_shards(folder, base.root, contents, shard_bytes, tell or (lambda _: None))
            _write_config(folder, base.root, contents)
            copy_companions(folder, _folder_of_base(base.root, base_folder))


# --- the weights


def _write_shards(
    folder: Path, root: nn.Module, contents: Contents, shard_bytes: int, tell: Callable[[str], None]
) -> None:
    shards = list(_split(contents.entries, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        tensors = {name: _own(contents.entries[name].read()) for name in shard}
        tensors = {name: _own(tensor) for name, tensor in _as_published(root, tensors).items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        size = sum(tensor.nbytes for tensor in tensors.values())
        total += size
        tell(f"{file}: {len(tensors)} tensors, {size / 1e6:,.1f} MB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _split(entries: Mapping[str, Entry], shard_bytes: int) -> Iterator[list[str]]:
    """The names in shards of at most this size, or of one tensor that is larger."""
    shard: list[str] = []
    size = 0
    for name, entry in entries.items():
        if shard and size + entry.size > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += entry.size
    yield shard


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and without a larger storage behind it."""
    plain = tensor.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _as_published(root: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the model's published checkpoints.

    transformers fuses and renames some weights when it loads a model, and undoes that in saving.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(root, "save_pretrained"):
        return tensors
    published: dict[str, Tensor] = revert(root, tensors)
    return published


# --- what goes with them


def _write_config(folder: Path, root: nn.Module, contents: Contents) -> None:
    """The config of a model of transformers; other models have none."""
    config: Any = getattr(root, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(root).__name__]
    if contents.is_untied:
        config.tie_word_embeddings = False
    if contents.is_dequantised and hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    generation: Any = getattr(root, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)


def _folder_of_base(root: nn.Module, given: str | os.PathLike[str] | None) -> Path | None:
    """Where the base came from; None if that is not a folder, or not known."""
    name = given or getattr(getattr(root, "config", None), "name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    warn(
        f"the tokenizer was not copied, since {name} is not a folder",
        advice="Give base_folder=, or save it beside the model: tokenizer.save_pretrained(folder)",
    )
    return None


def copy_companions(folder: Path, base_folder: Path | None) -> None:
    """Tokenizer, chat template, processor and code of the model, unless they are there."""
    for entry in sorted(base_folder.iterdir()) if base_folder else ():
        belongs = entry.name.startswith(COMPANION_STARTS) or entry.name.endswith(COMPANION_ENDS)
        if belongs and entry.is_file() and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)
