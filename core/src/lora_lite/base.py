"""The model that an adapter is written from or read for, as a format may look at it."""

from collections.abc import Iterable

from torch import nn

from lora_lite.errors import LayerKindError
from lora_lite.experts import expert_stacks
from lora_lite.fileformat import FilePath
from lora_lite.layers import class_name
from lora_lite.missing import refuse_missing
from lora_lite.modules import layer_modules, named_modules
from lora_lite.placements import _layer_spec
from lora_lite.plugins import kind_of
from lora_lite.rename import Renaming, new_paths
from lora_lite.site import Site


class Base:
    """A model, seen under the paths that a file has for its layers.

    Args:
        path: of the file.
        root: the model.
        rename: from the file's paths to the model's; None if they are the same.

    Attributes:
        root: the model. A format must not change it.
    """

    def __init__(self, path: FilePath, root: nn.Module, rename: Renaming = None) -> None:
        self.root = root
        self._path = path
        self._rename = rename
        self._modules = layer_modules(root)

    @property
    def paths(self) -> list[str]:
        """The paths of all modules of the model."""
        return [path for path, _ in named_modules(self.root)]

    def sites(self, paths: Iterable[str]) -> dict[str, Site]:
        """The layers at some paths of the file, by these paths.

        Raises:
            AdapterFileError: the model does not have some of them; all of these are listed.
            LayerKindError: one of them cannot be read as a linear layer.
        """
        own = new_paths(self._path, list(paths), self._rename)
        refuse_missing(self._path, self.root, list(own.values()), self._modules)
        return {path: self._site(place) for path, place in own.items()}

    def module(self, path: str) -> nn.Module:
        """The layer itself at a path of the file, which is in the model.

        The path of a parameter that holds experts gives the module that it is a parameter of.

        Raises:
            AdapterFileError: the model does not have it.
        """
        own = new_paths(self._path, [path], self._rename)
        refuse_missing(self._path, self.root, list(own.values()), self._modules)
        return self._modules[own[path]]

    def _site(self, place: str) -> Site:
        module = self._modules[place]
        holder, _, name = place.rpartition(".")
        stacks = expert_stacks(module) if self._modules.get(holder) is module else {}
        kind = stacks.get(name) or kind_of(module)
        if kind is None:
            raise LayerKindError(
                f"{self._path} adapts {place}, a {class_name(module)}",
                expected="Here adapters go to linear layers, and no installed layer kind reads it",
                layers=(place,),
            )
        return Site(_layer_spec(place, module, kind), module)
