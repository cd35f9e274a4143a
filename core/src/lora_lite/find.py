"""What a model is made of: its layers, and the weights that no adapter can reach.

1. `find_layers` lists every layer with a weight matrix, or that looks as if it had one; and the
   other modules with parameters of their own, for variants that can replace those.
2. `find_others` lists every other weight that holds a matrix: fused experts, grouped convolutions.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_lite.experts import ExpertStack, expert_stacks
from lora_lite.hooked import hooks_of
from lora_lite.kinds import refusal
from lora_lite.layers import LayerKind, looks_linear
from lora_lite.modules import named_modules
from lora_lite.plugins import kind_of
from lora_lite.shared import names_on
from lora_lite.variant import Variant
from lora_lite.whole_module import WholeModule

Modules = Sequence[tuple[str, nn.Module]]

# They return several tensors, and torch's attention reads the weights of a module inside it.
NEVER_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.LSTMCell)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that an adapter may go to, or that looks linear.

    Attributes:
        module: the layer itself.
        kind: what can read it; None if no installed layer kind can.
        paths: every path at which the model holds it; a shared layer has several.
        blocks: the indices of the repeated blocks that it lies in.
        is_called: whether its parent calls it, so that hooks on it run.
    """

    module: nn.Module
    kind: LayerKind | None
    paths: tuple[str, ...]
    blocks: frozenset[int]
    is_called: bool

    @property
    def path(self) -> str:
        """The first path, which names the layer."""
        return self.paths[0]

    @property
    def numbers(self) -> int:
        """How many numbers its weight holds, were it dense."""
        if self.kind is not None:
            return self.kind.count(self.module) * math.prod(self.kind.shape(self.module))
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def is_default(self) -> bool:
        """Whether an adapter goes there without being asked to, if it lies in the blocks.

        Two linear layers of mixtures are left alone: a router that returns its choice as well, and
        a gate of one output, which has no rank to choose.
        """
        if self.kind is None:
            return "num_experts" not in self.module.__dict__
        _, d_out = self.kind.shape(self.module)
        return self.is_linear and d_out > 1

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, or looks like one."""
        return self.kind is None or self.kind.default

    @property
    def has_matrix(self) -> bool:
        """Whether it has a weight matrix, or looks as if it had one."""
        return self.kind is None or self.kind.has_matrix

    @property
    def holds_experts(self) -> bool:
        """Whether it is a parameter that holds the experts of a mixture."""
        return isinstance(self.kind, ExpertStack)

    def takes(self, variant: Variant) -> bool:
        """Whether a variant can go to layers of this kind at all.

        A variant that replaces the parameters of a layer replaces all experts as one module.
        """
        if variant.replaces_weights:
            return not self.holds_experts
        return self.has_matrix

    def has_path_like(self, pattern: re.Pattern[str]) -> bool:
        """Whether `pattern` is found in one of the paths."""
        return any(pattern.search(path) for path in self.paths)


@dataclass(frozen=True)
class OtherWeight:
    """A weight with two dimensions or more that is not the weight of a `Layer`.

    Attributes:
        path: of the parameter, such as `model.layers.0.mlp.experts.gate_up_proj`.
        owner: the class of the module that holds it, and why that is not adapted.
        shape: of the parameter.
        in_blocks: whether it lies in the repeated blocks.
        is_bare: whether a module of the model's own holds it; False for a layer of torch, such as
            a convolution with groups.
    """

    path: str
    owner: str
    shape: tuple[int, ...]
    in_blocks: bool
    is_bare: bool

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def holder(self) -> str:
        """The path of the module that holds it."""
        return self.path.rpartition(".")[0]

    def has_path_like(self, pattern: re.Pattern[str]) -> bool:
        """Whether `pattern` is found in the path of the parameter or of its module."""
        return bool(pattern.search(self.path) or pattern.search(self.holder))

    def __str__(self) -> str:
        shape = " x ".join(str(size) for size in self.shape)
        what = f"a bare parameter of {self.owner}, not a layer" if self.is_bare else self.owner
        return f"{self.path} ({shape}) is {what}"


# --- 1. layers


def find_layers(modules: Modules, *, whole: bool = False) -> list[Layer]:
    """Every layer with a weight matrix, or that looks linear, in the order of the model.

    Args:
        modules: all modules of the model under all of their paths, as `named_modules` gives them.
        whole: whether to list modules without a weight matrix as well.
    """
    paths_of: dict[tuple[nn.Module, LayerKind | None], list[str]] = {}
    kinds: dict[nn.Module, LayerKind | None] = {}
    never_called: set[nn.Module] = set()
    for path, module in modules:
        if isinstance(module, nn.MultiheadAttention):
            # Its forward reads out_proj.weight and never calls out_proj.
            never_called.add(module.out_proj)
        if module not in kinds:
            kinds[module] = kind_of(module)
            if whole and path and kinds[module] is None and not looks_linear(module):
                kinds[module] = _as_whole(module)
        if kinds[module] is not None or looks_linear(module):
            paths_of.setdefault((module, kinds[module]), []).append(path)
        for name, kind in expert_stacks(module).items():
            paths_of.setdefault((module, kind), []).append(f"{path}.{name}".lstrip("."))
    blocks = _block_lists(modules)
    return [
        Layer(
            module=module,
            kind=kind,
            paths=tuple(paths),
            blocks=_block_indices(paths, blocks),
            is_called=module not in never_called,
        )
        for (module, kind), paths in paths_of.items()
    ]


def kind_at(path: str, modules: Mapping[str, nn.Module], variant: Variant) -> LayerKind | None:
    """The kind of a layer, for a variant to be attached to it; None if it cannot be.

    Args:
        path: of the layer.
        modules: as `layer_modules` gives them.
        variant: to be attached.
    """
    module = modules[path]
    holder, _, name = path.rpartition(".")
    if modules.get(holder) is module and name in expert_stacks(module):
        return expert_stacks(module)[name]
    kind = kind_of(module)
    if kind is None and variant.replaces_weights and not looks_linear(module):
        return _as_whole(module)
    return kind


def _as_whole(module: nn.Module) -> WholeModule | None:
    """The kind of a module that has parameters of its own, besides those of its adapters."""
    hooks = hooks_of(module)
    adapters = set() if hooks is None else hooks.tensor_names()
    names = [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and name not in adapters
    ]
    if not names or isinstance(module, NEVER_WHOLE):
        return None
    return WholeModule(tuple(names))


def _block_lists(modules: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """The paths of the lists of repeated blocks."""
    return {path for path, module in modules if _is_block_list(module)}


def _is_block_list(module: nn.Module) -> bool:
    """A ModuleList, or an nn.Sequential of several blocks of one class that is not torch's own."""
    if isinstance(module, nn.ModuleList):
        return True
    if type(module) is not nn.Sequential or len(module) < 2:
        return False
    classes = {type(block) for block in module}
    return len(classes) == 1 and not _is_from_torch(module[0])


def _block_indices(paths: Iterable[str], block_lists: set[str]) -> frozenset[int]:
    """The index of the repeated block around each path, for the paths that lie in one."""
    indices = {_block_index(path, block_lists) for path in paths}
    return frozenset(index for index in indices if index is not None)


def _block_index(path: str, block_lists: set[str]) -> int | None:
    """The index of the outermost repeated block that holds `path`, or None."""
    parent = ""
    for name in path.split("."):
        if parent in block_lists and name.isdigit():
            return int(name)
        parent = f"{parent}.{name}" if parent else name
    return None


# --- 2. every other weight


def find_others(modules: Modules, layers: Iterable[Layer]) -> Iterator[OtherWeight]:
    """Every parameter of two dimensions or more that is not in a layer with a weight matrix.

    Args:
        modules: as for `find_layers`.
        layers: what `find_layers` found.
    """
    done = {layer.module for layer in layers if layer.has_matrix and not layer.holds_experts}
    block_lists = _block_lists(modules)
    for path, module in modules:
        if module in done:
            continue
        done.add(module)
        reason = refusal(module)
        # Of torch, only attention holds projections that a user may take for layers.
        is_layer = _is_from_torch(module) or bool(reason)
        is_bare = not is_layer or isinstance(module, nn.MultiheadAttention)
        known = {*expert_stacks(module), *names_on(module)}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2 and name not in known:
                yield OtherWeight(
                    path=f"{path}.{name}" if path else name,
                    owner=type(module).__name__ + reason,
                    shape=tuple(parameter.shape),
                    in_blocks=_block_index(f"{path}.{name}", block_lists) is not None,
                    is_bare=is_bare,
                )


def numbers_in(root: nn.Module) -> int:
    """How many numbers the weights of a model hold, were they dense: all but linear layers' biases.

    The tensors of adapters are not counted.
    """
    modules = list(named_modules(root))
    layers = [layer for layer in find_layers(modules, whole=True) if not layer.holds_experts]
    counted = {path for layer in layers for path in layer.paths}
    others = [weight for weight in find_others(modules, layers) if weight.holder not in counted]
    return sum(layer.numbers for layer in layers) + sum(weight.numbers for weight in others)


def _is_from_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")
