"""What training changes of a model beside its adapters: parameters that the user trains too, and
the running statistics of normalisations.

A checkpoint has to hold it, or a run that is resumed is another one.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lite.errors import AdapterFileError
from lora_lite.fileformat import FilePath
from lora_lite.layers import whole
from lora_lite.modules import plain_path
from lora_lite.registry import registry_of
from lora_lite.statistics import changed_statistics, statistics_of


def live_tensors(root: nn.Module) -> dict[str, Tensor]:
    """All that may change: the parameters of the base that train, and all running statistics."""
    return {**_trained(root), **statistics_of(root)}


def changed_tensors(root: nn.Module) -> dict[str, Tensor]:
    """All that must be saved, in whole tensors. On a sharded model every process must call this.

    The statistics are among them only if one of them has changed.
    """
    registry = registry_of(root)
    assert registry is not None
    tensors = _trained(root)
    if changed_statistics(root, registry.statistics):
        tensors |= statistics_of(root)
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write them to a file of safetensors, each in memory of its own."""
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, file)


def saved_values(file: Path | None, root: nn.Module, folder: FilePath) -> dict[str, Tensor]:
    """What every tensor of `live_tensors` was when it was saved.

    Args:
        file: the file in the folder; None if nothing had changed.
        root: the model.
        folder: for the error.

    Raises:
        AdapterFileError: other tensors train now, or a file that cannot be read.
    """
    registry = registry_of(root)
    assert registry is not None
    live = live_tensors(root)
    values = {name: value for name, value in registry.statistics.items() if name in live}
    if file is not None:
        values |= _read(file)
    differences = [
        f"{name}: {_difference(live.get(name), values.get(name))}"
        for name in dict.fromkeys([*values, *live])
        if _difference(live.get(name), values.get(name))
    ]
    if differences:
        raise AdapterFileError(
            f"{folder} was saved when something else was trained beside the adapters",
            details=differences,
            fix="Set requires_grad of the base's parameters as it was when this was saved",
            path=str(folder),
            tensors=tuple(line.partition(":")[0] for line in differences),
        )
    return values


def _trained(root: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base that require a gradient."""
    registry = registry_of(root)
    assert registry is not None
    named = {plain_path(name): parameter for name, parameter in root.named_parameters()}
    return {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad and name in registry.trainable
    }


def _difference(now: Tensor | None, saved: Tensor | None) -> str:
    if now is None:
        return "in the folder, and not trained now"
    if saved is None:
        return "trained now, and not in the folder"
    if now.shape != saved.shape or now.dtype != saved.dtype:
        return (
            f"{list(saved.shape)} of {saved.dtype} in the folder, "
            f"{list(now.shape)} of {now.dtype} now"
        )
    return ""


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFileError(
            f"{file} cannot be read as safetensors: {error}", path=str(file)
        ) from error
