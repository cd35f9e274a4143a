"""Which layers an adapter goes to, and `plan`: the answer as a table, without touching the model."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lite.errors import (
    AdapterError,
    LayerKindError,
    MisfitError,
    SiteError,
    TargetError,
    bullets,
    did_you_mean,
)
from lora_lite.layers import class_name, looks_linear
from lora_lite.plugins import kind_of, make_variant, validated
from lora_lite.variant import Site, Spot, TensorSpec, Variant

Patterns = str | Sequence[str] | None
Indices = int | Iterable[int] | None
Overrides = Mapping[str, Mapping[str, Any]] | None

# Names that wrappers put into a module's path; a file must load with and without them.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)$")


@dataclass(frozen=True)
class Placement:
    """A variant at one site: what it will put there."""

    spot: Spot
    module: nn.Module
    variant: Variant
    specs: Mapping[str, TensorSpec]

    @property
    def site(self) -> Site:
        """The layer, as the variant sees it."""
        return Site(self.spot, self.module)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(spec.shape) for spec in self.specs.values() if spec.trainable)


@dataclass(frozen=True)
class Plan:
    """What `attach` would do with the same arguments.

    Attributes:
        variant: the variant, as validated.
        placements: one for each site, in the order of the model.
        unreachable: what hooks cannot reach, in words: weights held as bare parameters, layers of unknown kind.
    """

    variant: Variant
    placements: tuple[Placement, ...]
    unreachable: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Trainable numbers of all sites."""
        return sum(placement.parameters for placement in self.placements)

    @property
    def macs_per_token(self) -> int:
        """Added multiply-accumulates for each token, over all sites."""
        return sum(p.variant.macs_per_token(p.site) for p in self.placements)

    @property
    def macs_per_forward(self) -> int:
        """Added multiply-accumulates once a forward, over all sites."""
        return sum(p.variant.macs_per_forward(p.site) for p in self.placements)

    def __str__(self) -> str:
        rows = [
            (p.spot.path, f"{p.spot.d_in} -> {p.spot.d_out}", Plan(self.variant, (p,), ()))
            for p in self.placements
        ]
        rows.append(("total", f"{len(rows)} sites", self))
        width = max(len(path) for path, *_ in rows)
        head = (
            f"{'site':<{width}}   d_in -> d_out      parameters      MACs/token      MACs/forward"
        )
        costs = [
            f"{p.parameters:>14,}  {p.macs_per_token:>14,}  {p.macs_per_forward:>16,}"
            for _, _, p in rows
        ]
        lines = [
            f"{path:<{width}}  {shape:>14}  {cost}"
            for (path, shape, _), cost in zip(rows, costs, strict=True)
        ]
        return "\n".join(
            [
                str(self.variant),
                head,
                *lines,
                *(f"out of reach: {text}" for text in self.unreachable),
            ]
        )


def plan(
    model: nn.Module,
    variant: str | Variant,
    /,
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: Indices = None,
    overrides: Overrides = None,
    **fields: Any,
) -> Plan:
    """What `attach` would do with these arguments: sites, shapes, parameters, MACs. Nothing is touched, no weight is read, so
    a model on the meta device will do.

    Args:
        model: any module.
        variant: a name, or a `Variant` instance.
        targets: one or several regular expressions, searched in the module path. Default: the variant's own, else every
            linear layer inside the model's repeated blocks (its `ModuleList`s).
        exclude: likewise, taken away again. Default: the output head.
        layers: indices into the repeated blocks.
        overrides: `{regex: {field: value}}` for other hyperparameters at some sites; a later one wins.
        fields: hyperparameters, where `variant` is a name.

    Raises:
        UnknownVariantError, PluginError, FieldError: from `variant` and `fields`.
        TargetError, LayerKindError: from the choice of layers.
        MisfitError: the variant does not fit some sites; all of them are listed.
    """
    chosen = make_variant(variant, fields)
    root = root_of(model)
    found = find_layers(root)
    selected = _select(root, found, chosen, targets, exclude, layers)
    return Plan(
        chosen, place(_overridden(chosen, selected, overrides)), tuple(_unreachable(root, found))
    )


def place(choices: Iterable[tuple[str, nn.Module, Variant]]) -> tuple[Placement, ...]:
    """Ask every layer's kind for its shapes, and every variant for its tensors there.

    Raises:
        LayerKindError: no installed kind can read some layers; all of them are listed.
        MisfitError: all misfits together.
    """
    placements, misfits, unknown = [], [], []
    for path, module, variant in choices:
        kind = kind_of(module)
        if kind is None:
            unknown.append(
                f"{path}: {class_name(module)}, its weight {class_name(getattr(module, 'weight', None))}"
            )
            continue
        d_in, d_out = kind.shape(module)
        spot = Spot(path, kind, d_in, d_out, kind.bias(module) is not None)
        try:
            placements.append(Placement(spot, module, variant, variant.tensors(Site(spot, module))))
        except SiteError as error:
            misfits.append(f"{path} ({d_in} -> {d_out}): {variant.name}: {error}")
    if unknown:
        write = "write one (a lora_lite.LayerKind in the entry-point group lora_lite.layers, named after their root package)"
        ways = (
            f"Install the plugin that teaches their kind, {write}, or leave them out with exclude="
        )
        raise LayerKindError(
            f"these layers look linear, but no installed layer kind can read them. {ways}:{bullets(unknown)}"
        )
    if misfits:
        misfit = f"the variant does not fit {len(misfits)} of {len(placements) + len(misfits)} sites; nothing was changed"
        ways = "Choose other fields, or other ones for these sites (overrides=), or leave the sites out (exclude=)"
        raise MisfitError(f"{misfit}. {ways}:{bullets(misfits)}")
    return tuple(placements)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that is or looks linear, under all the paths at which the model holds it (the first one names it)."""

    path: str
    paths: tuple[str, ...]
    module: nn.Module
    blocks: frozenset[int]
    reachable: bool


def root_of(model: nn.Module) -> nn.Module:
    """The module itself, out of a `torch.compile` wrapper.

    Raises:
        AdapterError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the wrappers, under every one of its paths."""
    for path, module in root.named_modules(remove_duplicate=False):
        if not any(wrapper in module._modules for wrapper in WRAPPERS):
            yield plain_path(path), module


def plain_path(path: str) -> str:
    """A path without the names that wrappers add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def find_layers(root: nn.Module) -> list[Layer]:
    """Every layer that is or looks linear, in the order of the model."""
    paths: dict[nn.Module, list[str]] = {}
    lists: set[str] = set()
    unreachable: set[nn.Module] = set()
    for path, module in named_modules(root):
        if isinstance(module, nn.ModuleList):
            lists.add(path)
        elif isinstance(module, nn.MultiheadAttention):
            unreachable.add(module.out_proj)
        elif looks_linear(module) or kind_of(module) is not None:
            paths.setdefault(module, []).append(path)
    blocks = {module: frozenset(_blocks(names, lists)) for module, names in paths.items()}
    return [
        Layer(names[0], tuple(names), m, blocks[m], m not in unreachable)
        for m, names in paths.items()
    ]


def _blocks(paths: list[str], lists: set[str]) -> Iterator[int]:
    """The index of the outermost repeated block, for each path that lies in one."""
    for parts in (path.split(".") for path in paths):
        depth = next(
            (depth for depth in range(len(parts)) if ".".join(parts[:depth]) in lists), None
        )
        if depth is not None:
            yield int(parts[depth])


def _select(
    root: nn.Module,
    found: list[Layer],
    variant: Variant,
    targets: Patterns,
    exclude: Patterns,
    layers: Indices,
) -> list[Layer]:
    if not found:
        raise TargetError(f"{type(root).__name__} has no linear layer")
    groups = _matches(variant.default_targets if targets is None else targets, found, "targets")
    if targets is None:
        groups = [set().union(*groups) or {layer for layer in found if layer.blocks}]
    if not groups or not groups[0]:
        why = f"{type(root).__name__} has no repeated blocks (ModuleLists) to choose layers from by default"
        why = why if targets is None else "targets=() chooses no layer"
        raise TargetError(
            f"{why}; give targets=. The linear layers to choose from:{_inventory(found)}"
        )
    taken = (
        _heads(root, found)
        if exclude is None
        else set().union(*_matches(exclude, found, "exclude"))
    )
    for group in groups:
        if group <= taken:
            given = "exclude" if exclude else "exclude (by default the output head)"
            lost = bullets(layer.path for layer in found if layer in group)
            raise TargetError(
                f"{given} takes away all that a pattern of targets= matches; exclude=() would adapt these:{lost}"
            )
    chosen = set().union(*groups) - taken
    selected = [layer for layer in found if layer in chosen]
    selected = selected if layers is None else _inside(selected, found, layers)
    if silent := [layer.path for layer in selected if not layer.reachable]:
        why = "because their parent (nn.MultiheadAttention) reads their weight without calling them"
        raise TargetError(
            f"hooks never fire on these layers, {why}; leave them out with exclude=:{bullets(silent)}"
        )
    return selected


def _inside(selected: list[Layer], found: list[Layer], layers: int | Iterable[int]) -> list[Layer]:
    """Those that lie in the repeated blocks `layers`."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    known: set[int] = set().union(*(layer.blocks for layer in found))
    kept = [layer for layer in selected if wanted & layer.blocks]
    if not kept or not wanted <= known:
        have = f"repeated blocks {f'0 to {max(known)}' if known else 'none at all'}"
        raise TargetError(
            f"layers={sorted(wanted)}: the model has {have}, and {len(kept)} of the chosen layers lie in those"
        )
    return kept


def _heads(root: nn.Module, found: list[Layer]) -> set[Layer]:
    head = getattr(root, "get_output_embeddings", lambda: None)()
    return {layer for layer in found if layer.module is head or any(map(HEAD.search, layer.paths))}


def _overridden(
    variant: Variant, selected: list[Layer], overrides: Overrides
) -> Iterator[tuple[str, nn.Module, Variant]]:
    fields: dict[Layer, dict[str, Any]] = {}
    for pattern, values in (overrides or {}).items():
        for layer in _matches(pattern, selected, "overrides")[0]:
            fields.setdefault(layer, {}).update(values)
    given = variant.model_dump(include=variant.model_fields_set)
    for layer in selected:
        other = validated(type(variant), {**given, **fields[layer]}) if layer in fields else variant
        yield layer.path, layer.module, other


def _matches(patterns: Patterns, among: list[Layer], argument: str) -> list[set[Layer]]:
    """The layers of each pattern. A pattern without a match is an error, also beside one that matches."""
    groups = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ()):
        try:
            groups.append(
                {layer for layer in among if any(re.search(pattern, path) for path in layer.paths)}
            )
        except (re.error, TypeError) as error:
            raise TargetError(
                f"{argument}={patterns!r}: not a regular expression: {error}"
            ) from None
        if not groups[-1]:
            names = {
                part for layer in among for part in layer.path.split(".") if not part.isdigit()
            }
            told = f"{argument}: {pattern!r} matches no linear layer{did_you_mean(pattern.strip('^$.'), names)}"
            raise TargetError(f"{told}\nThe linear layers to choose from:{_inventory(among)}")
    return groups


def _inventory(layers: list[Layer]) -> str:
    counts = Counter(layer.path.rpartition(".")[2] for layer in layers)
    return bullets(f"{suffix} x {count}" for suffix, count in counts.items())


def _unreachable(root: nn.Module, found: list[Layer]) -> Iterator[str]:
    known = {layer.module for layer in found}
    for path, module in root.named_modules():
        outside_torch = not type(module).__module__.startswith("torch.nn") and module not in known
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and (outside_torch or isinstance(module, nn.MultiheadAttention)):
                shape = " x ".join(map(str, parameter.shape))
                yield f"{path}.{name} ({shape}) is a bare parameter of {type(module).__name__}, not a layer"
    for layer in found:
        if not layer.reachable:
            yield f"{layer.path}: its parent reads the weight without calling the layer"
        elif kind_of(layer.module) is None:
            yield f"{layer.path}: no installed layer kind reads {type(layer.module).__name__}"
