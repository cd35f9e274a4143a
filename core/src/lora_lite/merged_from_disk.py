"""The format "merged" from a base on disk: the model is never in memory, only a layer at a time.

The new checkpoint is a copy of the base's files in which the bytes of the adapted weights are
other ones. A merged weight has the dtype and shape of the base's, so it goes where that one was.

What an adapter changes at a layer depends on that layer alone, so each is loaded by itself, with
its own part of the adapter's file. A base that does not lend itself to that, such as one whose
weights transformers fuses when it loads them, has to be loaded whole.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_lite.checkpoint import load_contents
from lora_lite.errors import AdapterFileError
from lora_lite.fileformat import dtypes_of, read
from lora_lite.foreign import is_own_file
from lora_lite.merged_checkpoint import INDEX, WEIGHTS, copy_companions
from lora_lite.metadata import Metadata
from lora_lite.modules import layer_modules, named_modules
from lora_lite.new_folder import new_folder
from lora_lite.plain_contents import plain_contents
from lora_lite.shared import is_shared

CONFIGS = ("config.json", "generation_config.json", INDEX)


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
        file: of the adapter.
        base: the folder of the base.
        files: for the name of each tensor of the base, its file.
        modules: the module of each adapted layer, without weights, and its path.
        described, tensors: what the adapter's file holds.
    """

    file: Path
    base: Path
    files: Mapping[str, str]
    modules: Mapping[str, tuple[str, nn.Module]]
    described: Metadata = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)


def plan_from_disk(file: Path, base: Path, empty: nn.Module) -> Plan | str:
    """What is to be written, or why the base has to be loaded whole.

    Args:
        file: of the adapter.
        base: the folder of the base.
        empty: the model, on the meta device.

    Raises:
        AdapterFileError: the adapter's file cannot be read.
    """
    files = _files_of(base)
    if files is None:
        return f"{base} has no {WEIGHTS} and no {INDEX}"
    if not is_own_file(file):
        return f"{file} is of another format than lora-lite's own"
    described, tensors = read(file)
    if any(map(is_shared, tensors)):
        return "the adapter has tensors that all layers share"
    if getattr(getattr(empty, "config", None), "quantization_config", None) is not None:
        return "the base is quantised"
    modules: dict[str, tuple[str, nn.Module]] = {}
    known, named = layer_modules(empty), dict(named_modules(empty))
    names = _names_of_parameters(empty)
    for path in described.sites:
        module = known.get(path)
        if module is None:
            return f"the model has no layer {path}"  # loading it says more
        holder = path if named.get(path) is module else path.rpartition(".")[0]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if f"{holder}.{name}" not in files:
                return f"the checkpoint has no {holder}.{name}, under this name"
            if len(names[id(parameter)]) > 1:
                return f"{' and '.join(names[id(parameter)])} are one weight"
        if any(buffer is not None for buffer in module._buffers.values()):
            return f"{path} has buffers"
        modules[path] = holder, module
    return Plan(file, base, files, modules, described, tensors)


def write_from_disk(plan: Plan, out: Path, tell: Callable[[str], None]) -> None:
    """Write the checkpoint.

    Args:
        plan: of `plan_from_disk`.
        out: the folder, which must not be there yet, or be empty.
        tell: is given a line for each file.

    Raises:
        AdapterError: as `load`, for a base with other weights for instance; or a layer without a
            bias would need one.
        AdapterFileError: the folder is there already, or cannot be written.
    """
    files = sorted(set(plan.files.values()))
    with new_folder(out) as folder:
        for number, name in enumerate(files, start=1):
            start, header = _header(plan.base / name)
            shutil.copyfile(plan.base / name, folder / name)
            sites = _sites_in(plan, name)
            for path in sites:
                merged = _merged(plan, path)
                own = {key: tensor for key, tensor in merged.items() if plan.files.get(key) == name}
                _overwrite(folder / name, own, start, header)
            tell(f"{name} ({number} of {len(files)}): {len(sites)} layers merged")
        for name in CONFIGS:
            if (plan.base / name).is_file():
                shutil.copyfile(plan.base / name, folder / name)
        copy_companions(folder, plan.base)


# --- the base


def _files_of(base: Path) -> dict[str, str] | None:
    """The file of each tensor; None if the folder has no weights of safetensors."""
    if (base / INDEX).is_file():
        try:
            return dict(json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{base / INDEX} cannot be read: {error}") from None
    if (base / WEIGHTS).is_file():
        return dict.fromkeys(_header(base / WEIGHTS)[1], WEIGHTS)
    return None


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and where each of them lies from there on.

    Raises:
        AdapterFileError: it cannot be read, or is cut off.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}", path=str(file)) from None
    header.pop("__metadata__", None)
    size = max((place["data_offsets"][1] for place in header.values()), default=0)
    if file.stat().st_size != 8 + length + size:
        raise AdapterFileError(
            f"{file} is damaged: it has {file.stat().st_size} bytes, and its header tells of "
            f"{8 + length + size}",
            fix="Download the base again",
            path=str(file),
        )
    return 8 + length, header


def _names_of_parameters(root: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter: a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


# --- one layer


def _sites_in(plan: Plan, file: str) -> list[str]:
    """The adapted layers that have a parameter in a file."""
    return [
        path
        for path, (holder, module) in plan.modules.items()
        if any(plan.files.get(f"{holder}.{name}") == file for name in module._parameters)
    ]


def _merged(plan: Plan, path: str) -> dict[str, Tensor]:
    """The parameters of an adapted layer with the adapter's change, by their names."""
    holder, module = plan.modules[path]
    others = [place for place, (other, _) in plan.modules.items() if other == holder]
    own = _weights(plan, holder, module._parameters)
    root = _alone(holder, module, own)
    adapter = load_contents(plan.file, *_part(plan, others), root)
    contents = plain_contents(root, adapter, dequantise=False)
    return {name: entry.read() for name, entry in contents.entries.items()}


def _weights(
    plan: Plan, holder: str, parameters: Mapping[str, nn.Parameter | None]
) -> dict[str, Tensor]:
    """The layer's own parameters, from the files of the base."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter is not None:
            full = f"{holder}.{name}"
            with safe_open(plan.base / plan.files[full], "pt") as file:
                found[name] = file.get_tensor(full).clone()
    return found


def _alone(path: str, module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """A model that has one layer, at its path."""
    layer = copy.deepcopy(module).eval()
    for name, tensor in own.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    *parents, last = path.split(".")
    root = parent = nn.Module().eval()
    for name in parents:
        child = nn.Module().eval()
        parent.add_module(name, child)
        parent = child
    parent.add_module(last, layer)
    return root


def _part(plan: Plan, paths: Iterable[str]) -> tuple[Metadata, dict[str, Tensor]]:
    """What the adapter's file would hold if these were all of its layers."""
    chosen = set(paths)
    tensors = {k: t for k, t in plan.tensors.items() if k.rpartition(".")[0] in chosen}
    described = plan.described
    own = {path: index for path, index in described.sites.items() if path in chosen}
    prints = {path: sample for path, sample in described.fingerprint.items() if path in chosen}
    changes = {"sites": own, "fingerprint": prints, "dtypes": dtypes_of(tensors)}
    return described.model_copy(update=changes), tensors


@torch.no_grad()
def _overwrite(
    path: Path, tensors: Mapping[str, Tensor], start: int, header: Mapping[str, Any]
) -> None:
    """Put tensors in the place of those of the same name in a file with this header."""
    with path.open("r+b") as opened:
        for name, tensor in tensors.items():
            begin, end = header[name]["data_offsets"]
            data = save({name: tensor.contiguous()})
            length = end - begin
            opened.seek(start + begin)
            opened.write(memoryview(data)[len(data) - length :])
