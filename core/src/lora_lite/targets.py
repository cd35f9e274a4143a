"""Which layers an adapter goes to, and `plan`: the answer as a table, without touching the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lite.errors import AdapterError, LayerKindError, MisfitError, SiteError, TargetError, bullets, did_you_mean
from lora_lite.layers import LayerKind, looks_linear
from lora_lite.plugins import kind_of, make_variant, validated
from lora_lite.variant import Site, Spot, TensorSpec, Variant

Patterns = str | Sequence[str] | None
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
        width = max(len("total"), *(len(p.spot.path) for p in self.placements))
        row = f"{{:<{width}}}  {{:>14}}  {{:>14}}  {{:>14}}  {{:>16}}"
        lines = [str(self.variant), row.format("site", "d_in -> d_out", "parameters", "MACs/token", "MACs/forward")]
        for p in self.placements:
            site = p.site
            macs = p.variant.macs_per_token(site), p.variant.macs_per_forward(site)
            shape = f"{site.d_in} -> {site.d_out}"
            lines.append(row.format(site.path, shape, f"{p.parameters:,}", f"{macs[0]:,}", f"{macs[1]:,}"))
        total = f"{self.parameters:,}", f"{self.macs_per_token:,}", f"{self.macs_per_forward:,}"
        lines.append(row.format("total", f"{len(self.placements)} sites", *total))
        return "\n".join(lines + [f"out of reach: {text}" for text in self.unreachable])


def plan(
    model: nn.Module,
    variant: str | Variant,
    /,
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: int | Iterable[int] | None = None,
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
    variants = _override(chosen, selected, overrides)
    placements = place([(_spot(layer), layer.module, v) for layer, v in zip(selected, variants, strict=True)])
    return Plan(chosen, placements, tuple(_unreachable(root, found)))


def place(choices: Iterable[tuple[Spot, nn.Module, Variant]]) -> tuple[Placement, ...]:
    """Ask every variant for its tensors.

    Raises:
        MisfitError: all misfits together.
    """
    placements, misfits = [], []
    for spot, module, variant in choices:
        try:
            specs = variant.tensors(Site(spot, module))
        except SiteError as error:
            misfits.append(f"{spot.path} ({spot.d_in} -> {spot.d_out}): {variant.name}: {error}")
            continue
        placements.append(Placement(spot, module, variant, specs))
    if misfits:
        total = len(placements) + len(misfits)
        raise MisfitError(
            f"the variant does not fit {len(misfits)} of {total} sites; nothing was changed. Choose other fields, or set them "
            f"for these sites with overrides=, or leave the sites out with exclude=:{bullets(misfits)}"
        )
    return tuple(placements)


@dataclass(frozen=True)
class Layer:
    """A module that is or looks linear, under all the paths at which the model holds it (the first one names it)."""

    module: nn.Module
    paths: tuple[str, ...]
    blocks: tuple[int, ...]
    reachable: bool

    @property
    def path(self) -> str:
        return self.paths[0]


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
    """Every module under every one of its paths, without wrappers and the names that they add."""
    for path, module in root.named_modules(remove_duplicate=False):
        if not any(wrapper in module._modules for wrapper in WRAPPERS):
            yield ".".join(part for part in path.split(".") if part not in WRAPPERS), module


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
    return [
        Layer(module, tuple(names), tuple(_blocks(names, lists)), module not in unreachable) for module, names in paths.items()
    ]


def _blocks(paths: list[str], lists: set[str]) -> Iterator[int]:
    """The index of the outermost repeated block, for each path that lies in one."""
    for path in paths:
        parts = path.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[:depth]) in lists:
                yield int(parts[depth])
                break


def _select(
    root: nn.Module,
    found: list[Layer],
    variant: Variant,
    targets: Patterns,
    exclude: Patterns,
    layers: int | Iterable[int] | None,
) -> list[Layer]:
    if not found:
        raise TargetError(f"{type(root).__name__} has no linear layer")
    if targets is None and not variant.default_targets:
        selected = [layer for layer in found if layer.blocks]
        if not selected:
            raise TargetError(
                f"{type(root).__name__} has no repeated blocks (ModuleLists) to choose layers from by default; "
                f"give targets=. Its linear layers:{_inventory(found)}"
            )
    else:
        patterns = _compile(variant.default_targets if targets is None else targets, "targets")
        selected = _matching(patterns, found, found, "targets")
    taken = _excluded(root, found, exclude)
    for chosen in [selected] if targets is None else [_matching([p], found, found, "targets") for p in patterns]:
        if all(layer.module in taken for layer in chosen):
            raise TargetError(
                f"exclude{'' if exclude else ' (by default the output head)'} takes away all that targets= matches"
                f"{'' if targets is None else ' with one of its patterns'}:{bullets(layer.path for layer in chosen)}\n"
                "To adapt these, give exclude=(); else leave the pattern out"
            )
    return _only_usable(_only_blocks([layer for layer in selected if layer.module not in taken], found, layers))


def _only_blocks(selected: list[Layer], found: list[Layer], layers: int | Iterable[int] | None) -> list[Layer]:
    if layers is None:
        return selected
    wanted = {layers} if isinstance(layers, int) else set(layers)
    known = {block for layer in found for block in layer.blocks}
    if not wanted or not wanted <= known:
        have = f"0 to {max(known)}" if known else "none at all"
        raise TargetError(f"layers={sorted(wanted)}: the model has repeated blocks {have}")
    kept = [layer for layer in selected if wanted & set(layer.blocks)]
    if not kept:
        raise TargetError(f"layers={sorted(wanted)}: none of the chosen layers lies in these blocks")
    return kept


def _only_usable(selected: list[Layer]) -> list[Layer]:
    silent = [layer.path for layer in selected if not layer.reachable]
    if silent:
        raise TargetError(
            "hooks never fire on these layers, because their parent (nn.MultiheadAttention) reads their weight "
            f"without calling them; leave them out with exclude=:{bullets(silent)}"
        )
    unknown = [
        f"{layer.path}: {type(layer.module).__module__}.{type(layer.module).__qualname__}"
        for layer in selected
        if kind_of(layer.module) is None
    ]
    if unknown:
        raise LayerKindError(
            "these layers look linear, but no installed layer kind can read them. Install the plugin that teaches their kind, "
            "write one (a lora_lite.LayerKind in the entry-point group lora_lite.layers, named after the layer's root "
            f"package), or leave them out with exclude=:{bullets(unknown)}"
        )
    return selected


def _excluded(root: nn.Module, found: list[Layer], exclude: Patterns) -> set[nn.Module]:
    if exclude is not None:
        patterns = _compile(exclude, "exclude")
        return {layer.module for layer in _matching(patterns, found, found, "exclude")} if patterns else set()
    heads = {layer.module for layer in found if any(HEAD.search(path) for path in layer.paths)}
    get: Callable[[], Any] | None = getattr(root, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return heads | ({head} if isinstance(head, nn.Module) else set())


def _override(variant: Variant, selected: list[Layer], overrides: Overrides) -> list[Variant]:
    if not overrides:
        return [variant] * len(selected)
    fields: dict[nn.Module, dict[str, Any]] = {}
    for pattern, values in overrides.items():
        for layer in _matching(_compile(pattern, "overrides"), selected, selected, "overrides"):
            fields.setdefault(layer.module, {}).update(values)
    given = variant.model_dump(include=variant.model_fields_set)
    return [
        validated(type(variant), {**given, **fields[layer.module]}) if layer.module in fields else variant for layer in selected
    ]


def _compile(patterns: Patterns, argument: str) -> list[re.Pattern[str]]:
    texts = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if argument == "targets" and not texts:
        raise TargetError("targets=() chooses no layer; give a regular expression, or leave it out for the default")
    try:
        return [re.compile(text) for text in texts]
    except (re.error, TypeError) as error:
        raise TargetError(f"{argument}={patterns!r}: not a regular expression: {error}") from None


def _matching(patterns: list[re.Pattern[str]], among: list[Layer], found: list[Layer], argument: str) -> list[Layer]:
    """The layers that match any pattern. A pattern without a match is an error, also beside one that matches."""
    hit: set[nn.Module] = set()
    for pattern in patterns:
        matches = {layer.module for layer in among if any(pattern.search(path) for path in layer.paths)}
        if not matches:
            names = {part for layer in found for part in layer.path.split(".") if not part.isdigit()}
            raise TargetError(
                f"{argument}: {pattern.pattern!r} matches no linear layer{did_you_mean(pattern.pattern.strip('^$.'), names)}\n"
                f"The linear layers to choose from:{_inventory(found)}"
            )
        hit |= matches
    return [layer for layer in among if layer.module in hit]


def _inventory(found: list[Layer]) -> str:
    counts = Counter(layer.path.rpartition(".")[2] for layer in found)
    return bullets(f"{suffix} x {count}" for suffix, count in counts.items())


def _spot(layer: Layer) -> Spot:
    kind = kind_of(layer.module)
    assert kind is not None
    return spot_at(layer.path, layer.module, kind)


def spot_at(path: str, module: nn.Module, kind: LayerKind) -> Spot:
    """Where a site is, with the shapes that its kind reads."""
    d_in, d_out = kind.shape(module)
    return Spot(path, kind, d_in, d_out, kind.bias(module) is not None)


def _unreachable(root: nn.Module, found: list[Layer]) -> Iterator[str]:
    known = {layer.module for layer in found}
    for path, module in root.named_modules():
        outside_torch = not type(module).__module__.startswith("torch.nn")
        if isinstance(module, nn.MultiheadAttention) or (outside_torch and module not in known):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    shape = " x ".join(map(str, parameter.shape))
                    yield f"{path}.{name} ({shape}) is a bare parameter of {type(module).__name__}, not a layer"
    for layer in found:
        if not layer.reachable:
            yield f"{layer.path}: its parent reads the weight without calling the layer"
        elif kind_of(layer.module) is None:
            yield f"{layer.path}: no installed layer kind reads {type(layer.module).__name__}"
