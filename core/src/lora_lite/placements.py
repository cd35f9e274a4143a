"""What `attach` would do: a variant at each chosen layer, with the tensors it will put there.

`plan` answers that without touching the model:

1. `find_layers` lists the layers of the model.
2. `choose` keeps those that the user asks for, each with its variant (`targets`, `recipe`).
3. `place` asks every variant what it will put there: one `Placement` for each layer.
4. What no adapter can reach is listed, for the user to know.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lite.arguments import Indices, Overrides, Patterns
from lora_lite.author_mistakes import checked_macs, checked_specs
from lora_lite.errors import LayerKindError, MisfitError, SiteError
from lora_lite.find import Layer, OtherWeight, find_layers, find_others
from lora_lite.layers import LayerKind, class_name
from lora_lite.modules import named_modules, root_of
from lora_lite.per_expert import PerExpert, methods_for
from lora_lite.plan_table import plan_table
from lora_lite.recipe import Recipe, make_recipe
from lora_lite.shared import refuse_other_specs, tensor_key
from lora_lite.site import LayerSpec, Site
from lora_lite.targets import Choice, choose
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import Variant
from lora_lite.variant import overrides as overrides_method


@dataclass(frozen=True)
class Placement:
    """A variant at one layer, and the tensors that it will put there."""

    layer: LayerSpec
    module: nn.Module
    variant: Variant
    specs: Mapping[str, TensorSpec]

    @property
    def path(self) -> str:
        """The layer's name in the model."""
        return self.layer.path

    def key(self, name: str) -> str:
        """The name of one of its tensors in a state dict."""
        return tensor_key(self.path, self.variant.name, name, self.specs.get(name))

    @property
    def shared_keys(self) -> dict[str, str]:
        """The same for the tensors that it shares with other layers, by name."""
        return {name: self.key(name) for name, spec in self.specs.items() if spec.shared}

    @property
    def site(self) -> Site:
        """The layer as the variant sees it."""
        return Site(self.layer, self.module)

    @property
    def methods(self) -> Variant | PerExpert:
        """The variant's methods for this layer."""
        return methods_for(self.variant, self.layer.kind)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters, without those that layers share."""
        own = (spec for spec in self.specs.values() if spec.trainable and not spec.shared)
        return sum(math.prod(spec.shape) for spec in own)

    @property
    def macs_per_token(self) -> int:
        """The multiply-accumulates that the adapter adds for each token."""
        return checked_macs(self.methods, "macs_per_token", self.site)

    @property
    def macs_per_forward(self) -> int:
        """The multiply-accumulates that the adapter adds once in each forward pass."""
        return checked_macs(self.methods, "macs_per_forward", self.site)


@dataclass(frozen=True)
class Plan:
    """What `attach` would do with the same arguments. Printed, it is a table.

    Attributes:
        recipe: the variants, validated, by the pattern that chooses their layers.
        placements: one for each layer, in the order of the model.
        unreachable: the weights that hooks cannot reach, one sentence for each: bare parameters,
            layers of an unknown kind, and layers that are not read although a pattern matches.
    """

    recipe: Recipe
    placements: tuple[Placement, ...]
    unreachable: tuple[str, ...]
    _layers: tuple[Layer, ...] = field(repr=False)
    _others: tuple[OtherWeight, ...] = field(repr=False)
    _choice: Choice = field(repr=False)

    @property
    def variant(self) -> Variant:
        """The variant.

        Raises:
            AdapterError: the plan is for a recipe of several variants; ask its placements.
        """
        return self.recipe.variant

    @property
    def parameters(self) -> int:
        """The number of trainable parameters in all layers."""
        return sum(placement.parameters for placement in self.placements) + self.shared_parameters

    @property
    def shared_parameters(self) -> int:
        """The number of those among them that layers share."""
        shared = {
            placement.key(name): math.prod(spec.shape)
            for placement in self.placements
            for name, spec in placement.specs.items()
            if spec.shared and spec.trainable
        }
        return sum(shared.values())

    @property
    def macs_per_token(self) -> int:
        """The multiply-accumulates added for each token, in all layers."""
        return sum(placement.macs_per_token for placement in self.placements)

    @property
    def macs_per_forward(self) -> int:
        """The multiply-accumulates added once in each forward pass, in all layers."""
        return sum(placement.macs_per_forward for placement in self.placements)

    def __str__(self) -> str:
        return plan_table(self)


def plan(
    model: nn.Module,
    variant: str | Variant | Mapping[str, Any],
    /,
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: Indices = None,
    overrides: Overrides = None,
    **fields: Any,
) -> Plan:
    """Show what `attach` would do with these arguments: the layers, shapes, parameters and costs.

    The model is not touched and no weight is read, so a model on the meta device will do.

    Args:
        model: any module.
        variant: the name of an installed variant, an instance of a `Variant` subclass, or a recipe:
            `{regular expression: variant}` with a variant of its own for each group of layers,
            given as a name, as `(name, {field: value})`, or as an instance.
        targets: one or several regular expressions, searched for in the paths of the layers.
            Embeddings and convolutions are adapted if a pattern matches them. Default: the
            variant's own; if it has none, every linear layer inside the model's repeated blocks
            (its `ModuleList`s, and `nn.Sequential`s of one class of blocks).
        exclude: one or several regular expressions for layers to leave out. Default: the output
            head.
        layers: indices of the repeated blocks to adapt. Default: all.
        overrides: other hyperparameters for some layers, as `{regex: {field: value}}`. If several
            expressions match a layer, the last one wins.
        fields: the hyperparameters, if `variant` is a name.

    Raises:
        UnknownVariantError, PluginError, FieldError: from `variant` and `fields`.
        TargetError, LayerKindError: from the choice of layers.
        MisfitError: the variant does not fit some layers; all of them are listed.
    """
    root = root_of(model)
    recipe = make_recipe(variant, fields)
    modules = list(named_modules(root))
    whole = any(each.replaces_weights for each in recipe.variants)
    found = find_layers(modules, whole=whole)
    others = list(find_others(modules, found))
    choice = choose(
        found,
        others,
        root,
        recipe,
        targets=targets,
        exclude=exclude,
        layers=layers,
        overrides=overrides,
    )
    placements = place(
        (layer.path, layer.module, layer.kind, its_variant)
        for layer, its_variant in choice.variants.items()
    )
    unreachable = tuple(_out_of_reach(found, others, choice))
    return Plan(recipe, placements, unreachable, tuple(found), tuple(others), choice)


# --- 3. what the variant puts on each


def place(
    choices: Iterable[tuple[str, nn.Module, LayerKind | None, Variant]],
) -> tuple[Placement, ...]:
    """Ask every variant which tensors it puts on its layer.

    Args:
        choices: the path, module and kind of each layer, and the variant to put there.

    Raises:
        LayerKindError: no installed layer kind can read some layers; all of them are listed.
        MisfitError: the variant does not fit some layers; all of them are listed.
    """
    placements: list[Placement] = []
    misfits: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for path, module, kind, variant in choices:
        if kind is None:
            weight = getattr(module, "weight", None)
            unreadable[path] = f"{path}: {class_name(module)}, its weight {class_name(weight)}"
            continue
        layer = _layer_spec(path, module, kind)
        problem = _unsuited(kind, variant)
        if problem:
            misfits[path] = f"{path} ({type(module).__name__}): {variant.name} {problem}"
            continue
        try:
            specs = checked_specs(methods_for(variant, kind), Site(layer, module))
        except SiteError as error:
            misfits[path] = f"{path} ({layer.d_in} -> {layer.d_out}): {variant.name}: {error}"
        else:
            placements.append(Placement(layer, module, variant, specs))
    _refuse_unreadable(unreadable)
    _refuse_misfits(misfits, len(placements) + len(misfits))
    refuse_other_specs((each.path, each.variant.name, each.specs) for each in placements)
    return tuple(placements)


def _unsuited(kind: LayerKind, variant: Variant) -> str:
    """Why a variant cannot go to layers of a kind, as the end of a sentence; "" if it can."""
    if not kind.has_matrix and not variant.replaces_weights:
        return "works on a weight matrix, and this module has none"
    if not kind.forms_rows and overrides_method(type(variant), "delta_input"):
        return "changes x, which is not there as rows to be changed"
    return ""


def _layer_spec(path: str, module: nn.Module, kind: LayerKind) -> LayerSpec:
    d_in, d_out = kind.shape(module)
    return LayerSpec(path, kind, d_in, d_out, has_bias=kind.bias(module) is not None)


def _refuse_unreadable(unreadable: Mapping[str, str]) -> None:
    """An error if there are layers without a kind; `unreadable` describes each, by path."""
    if unreadable:
        raise LayerKindError(
            "these layers look linear, but no installed layer kind can read them",
            details=list(unreadable.values()),
            fix="Install the plugin for their kind; or write one (a lora_lite.author.LayerKind in "
            "the entry-point group lora_lite.layers, named after their root package); or leave "
            "them out with exclude=",
            argument="targets",
            layers=tuple(unreadable),
        )


def _refuse_misfits(misfits: Mapping[str, str], number_of_layers: int) -> None:
    """An error if there are layers that a variant does not fit; `misfits` says why, by path."""
    if misfits:
        raise MisfitError(
            f"the variant does not fit {len(misfits)} of {number_of_layers} layers",
            details=list(misfits.values()),
            fix="The model was not changed. Choose other hyperparameters, for all layers or for "
            "these (overrides=), or leave these layers out (exclude=)",
            argument="targets",
            layers=tuple(misfits),
        )


# --- 4. what stays out of reach


def _out_of_reach(
    found: Sequence[Layer], others: Sequence[OtherWeight], choice: Choice
) -> Iterator[str]:
    """One sentence for each weight of the model that no adapter can reach."""
    chosen = {path for layer in choice.variants for path in layer.paths}
    for weight in others:
        if weight.holder not in chosen and (weight.is_bare or weight in choice.passed_over):
            yield str(weight)
    for layer in found:
        if not layer.is_called:
            yield f"{layer.path}: its parent reads the weight without calling the layer"
        elif layer.kind is None:
            yield f"{layer.path}: no installed layer kind reads {type(layer.module).__name__}"
