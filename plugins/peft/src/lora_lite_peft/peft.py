"""The format "peft": the folder that `PeftModel.from_pretrained`, vLLM and others read.

    adapter.save("folder", format="peft")                 any method whose change is of low rank
    adapter.save("folder", format="peft", native=True)    PEFT's own DoRA, IA3, HRA, RoAd, DeLoRA
    ll.load(model, "folder")

A folder holds `adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not needed, to
write or to read.

Writing: `plain_lora` for everything of low rank, `native` for PEFT's own types. Reading:
`read_lora`, `read_others`, `read_dense`, `read_shared` and `read_boft`, by the config's peft_type.
What would be silently wrong is refused.
"""

from pathlib import Path
from typing import ClassVar

from lora_lite import Adapter, AdapterError, AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Format, make_variant
from lora_lite.progress import Tell

from lora_lite_peft import read_boft, read_dense, read_others, read_shared
from lora_lite_peft.description import description
from lora_lite_peft.files import (
    CONFIG,
    TENSORS,
    Folder,
    folder_of,
    read_config,
    read_tensors,
    write_folder,
)
from lora_lite_peft.leftover import modules_saved
from lora_lite_peft.native import native_folder
from lora_lite_peft.parts import parts_of
from lora_lite_peft.plain_lora import plain_folder
from lora_lite_peft.read_lora import read_lora
from lora_lite_peft.write_beside import beside_folder

READERS = {**read_others.READERS, **read_dense.READERS, **read_shared.READERS, **read_boft.READERS}


class Peft(Format):
    """A folder of Hugging Face PEFT."""

    name: ClassVar[str] = "peft"
    linear_layers_only: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        """A folder with a config or tensors under PEFT's names, or one of these two files."""
        if path.is_dir():
            return (path / CONFIG).is_file() or (path / TENSORS).is_file()
        return path.is_file() and path.name in (CONFIG, TENSORS)

    def write(
        self,
        adapter: Adapter,
        base: Base,
        path: Path,
        *,
        native: bool = False,
        rank: int | None = None,
        tell: Tell | None = None,
    ) -> None:
        """Write a folder.

        Args:
            adapter: at its present scale.
            base: its model.
            path: of the folder, which is made if it is not there.
            native: whether to write DoRA, IA3, HRA and others as PEFT's own types, and the
                ranks and scales of LoRA as they are. PEFT reads these; most servers do not.
            rank: the largest rank to write; a change of higher rank is truncated, with a warning
                that says how much is lost. None writes exact factors, or refuses.
            tell: is given lines of progress.

        Raises:
            AdapterError: a change is of full rank, and `native` is not set; or PEFT's own type has
                no place for it.
            AdapterFileError: the folder cannot be written.
        """
        if native and rank is not None:
            raise AdapterError(
                f"native=True and rank={rank!r} exclude each other",
                expected="rank= is for plain LoRA, into which a change is truncated",
                fix="Leave one of them out",
                adapter=adapter.name,
            )
        layers, others = parts_of(adapter)
        beside = beside_folder(others, base)
        folder = native_folder(layers, base) if native else plain_folder(layers, base, rank, tell)
        config = {**folder.config, **beside.config}
        write_folder(path, Folder(config, {**folder.tensors, **beside.tensors}))

    def describe(self, path: Path) -> str:
        """The settings that are set, and the layers with the shapes of their tensors."""
        folder = folder_of(path)
        return description(read_config(folder), read_tensors(folder))

    def read(self, path: Path, base: Base) -> ForeignAdapter:
        """Read a folder, or refuse it by name. See `Format.read`."""
        folder = folder_of(path)
        config = read_config(folder)
        kind = config.get("peft_type")
        if kind != "LORA" and kind not in READERS:
            raise AdapterFileError(
                f"{folder} is an adapter of PEFT's type {kind!r}",
                expected=f"The types that can be read are {', '.join(['LORA', *READERS])}",
                path=str(folder),
            )
        tensors = read_tensors(folder)
        if kind == "LORA":
            return read_lora(folder, config, tensors, base)
        saved, tensors = modules_saved(config.get("modules_to_save") or (), tensors, base)
        found = READERS[kind](folder, config, tensors, base)
        full = {path: make_variant("full", {}) for path in saved}
        return ForeignAdapter({**found.variants, **full}, {**found.tensors, **saved})
