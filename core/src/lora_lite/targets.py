"""Which layers an adapter goes to, and with which hyperparameters.

1. `_groups` finds the layers of each pattern that the user gives, or those of the default.
2. `_remaining` takes away what `exclude` and `layers` leave out.
3. What an adapter cannot reach, although a pattern asks for it, is refused or remembered.
4. `_with_overrides` gives each layer the variant with its own hyperparameters.

Whatever is asked for and not found is an error that shows what there is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lite.arguments import (
    Indices,
    Overrides,
    Patterns,
    block_indices,
    override_fields,
    patterns,
)
from lora_lite.errors import TargetError
from lora_lite.fields import validated
from lora_lite.find import Layer, OtherWeight
from lora_lite.no_match import names_with_counts, no_match
from lora_lite.output_head import output_heads
from lora_lite.reach import hold_much, refuse_unreachable_match, refuse_unreachable_weights
from lora_lite.recipe import Recipe
from lora_lite.variant import Variant


@dataclass(frozen=True)
class Choice:
    """The chosen layers.

    Attributes:
        variants: the variant of each layer, in the order of the model.
        by_default: whether the user left the choice to lora-lite.
        passed_over: weights that no adapter can reach, although a pattern matches them.
    """

    variants: dict[Layer, Variant]
    by_default: bool
    passed_over: frozenset[OtherWeight]


@dataclass(frozen=True)
class Group:
    """The layers that one pattern chooses.

    Attributes:
        source: what an error calls it, such as `targets='q_proj$'`.
        pattern: the regular expression; None for layers that are chosen without one.
        layers: as found.
        variant: for these layers.
    """

    source: str
    pattern: re.Pattern[str] | None
    layers: frozenset[Layer]
    variant: Variant


def choose(
    found: Sequence[Layer],
    others: Sequence[OtherWeight],
    root: nn.Module,
    recipe: Recipe,
    *,
    targets: Patterns,
    exclude: Patterns,
    layers: Indices,
    overrides: Overrides,
) -> Choice:
    """The layers that the user asks for, each with its variant.

    Raises:
        TargetError: a pattern without a match, an index out of range, a layer that hooks never
            reach.
        FieldError: from `overrides`.
    """
    indices = block_indices(layers)
    changes = override_fields(overrides)
    if not found:
        raise TargetError(
            f"{type(root).__name__} has no layer that an adapter could go to", argument="targets"
        )
    exclusions = None if exclude is None else patterns(exclude, "exclude")
    reachable = [w for w in others if not _is_excluded(w, exclusions)]
    groups = _groups(recipe, targets, found, reachable, root)
    excluded = _excluded_layers(exclusions, found, others, root)
    groups = [_remaining(group, excluded, indices, found) for group in groups]
    _refuse_uncalled(groups)
    _refuse_claimed_twice(groups)
    passed_over = _passed_over(groups, found, reachable)
    return Choice(
        variants=_with_overrides(_in_model_order(groups, found), changes),
        by_default=targets is None and not recipe.patterns,
        passed_over=passed_over,
    )


# --- 1. the layers of each pattern


def _groups(
    recipe: Recipe,
    targets: Patterns,
    found: Sequence[Layer],
    others: Sequence[OtherWeight],
    root: nn.Module,
) -> list[Group]:
    if recipe.patterns:
        if targets is not None:
            raise TargetError(
                "targets= was given beside a recipe, whose patterns choose the layers already",
                fix="Leave targets= out",
                argument="targets",
            )
        pairs = list(zip(recipe.patterns, recipe.variants, strict=True))
        return [
            _group("recipe", expression, found, others, variant) for expression, variant in pairs
        ]
    variant = recipe.variant
    if targets is not None:
        expressions = _at_least_one(targets, found)
        return [_group("targets", pattern, found, others, variant) for pattern in expressions]
    if variant.default_targets:
        source = f"the default targets of {variant.name!r}"
        return [_default_group(source, found, others, variant)]
    return [Group("the default", None, _layers_in_all_blocks(found, root), variant)]


def _group(
    argument: str,
    pattern: re.Pattern[str],
    found: Sequence[Layer],
    others: Sequence[OtherWeight],
    variant: Variant,
) -> Group:
    candidates = [layer for layer in found if layer.takes(variant)]
    layers = frozenset(layer for layer in candidates if layer.has_path_like(pattern))
    if not layers:
        refuse_unreachable_match(argument, pattern, others)
        raise no_match(argument, pattern, candidates)
    return Group(f"{argument}={pattern.pattern!r}", pattern, layers, variant)


def _default_group(
    source: str, found: Sequence[Layer], others: Sequence[OtherWeight], variant: Variant
) -> Group:
    """The layers of a variant's own patterns, each of which must match some."""
    expressions = patterns(variant.default_targets, "default_targets")
    linear = [layer for layer in found if layer.is_default]
    groups = [_group(source, pattern, linear, others, variant) for pattern in expressions]
    layers = frozenset().union(*(group.layers for group in groups))
    return Group(source, None, layers, variant)


def _at_least_one(targets: Patterns, found: Sequence[Layer]) -> list[re.Pattern[str]]:
    expressions = patterns(targets, "targets")
    if not expressions:
        raise TargetError(
            f"targets={targets!r} chooses none of this model's layers",
            details=names_with_counts(found),
            fix="Give at least one regular expression, or leave targets= out",
            argument="targets",
        )
    return expressions


def _layers_in_all_blocks(found: Sequence[Layer], root: nn.Module) -> frozenset[Layer]:
    linear = [layer for layer in found if layer.is_default]
    in_blocks = frozenset(layer for layer in linear if layer.blocks)
    if not in_blocks:
        raise TargetError(
            f"{type(root).__name__} has no repeated blocks (ModuleLists), from which layers are "
            "chosen by default. Its layers are",
            details=names_with_counts(found),
            fix="Choose some of them with targets=",
            argument="targets",
        )
    return in_blocks


# --- 2. what is left out


def _is_excluded(weight: OtherWeight, exclusions: list[re.Pattern[str]] | None) -> bool:
    return any(weight.has_path_like(pattern) for pattern in exclusions or ())


def _excluded_layers(
    exclusions: list[re.Pattern[str]] | None,
    found: Sequence[Layer],
    others: Sequence[OtherWeight],
    root: nn.Module,
) -> set[Layer]:
    """Those that `exclude` matches, or by default the output head."""
    if exclusions is None:
        return output_heads(found, root)
    excluded: set[Layer] = set()
    for pattern in exclusions:
        matches = {layer for layer in found if layer.has_path_like(pattern)}
        if not matches and not any(weight.has_path_like(pattern) for weight in others):
            raise no_match("exclude", pattern, found)
        excluded |= matches
    return excluded


def _remaining(
    group: Group, excluded: set[Layer], indices: frozenset[int] | None, found: Sequence[Layer]
) -> Group:
    """A group without what is left out; an error if nothing of it remains."""
    layers = group.layers - excluded
    if not layers:
        lost = sorted(layer.path for layer in group.layers)
        raise TargetError(
            f"exclude= leaves none of the layers that {group.source} chooses",
            details=lost,
            expected="By default the output head is left out",
            fix="To adapt these layers, give exclude=()",
            argument="exclude",
            layers=lost,
        )
    if indices is not None:
        layers = _layers_in_blocks(group.source, layers, indices, found)
    return Group(group.source, group.pattern, layers, group.variant)


def _layers_in_blocks(
    source: str, layers: frozenset[Layer], indices: frozenset[int], found: Sequence[Layer]
) -> frozenset[Layer]:
    existing = frozenset().union(*(layer.blocks for layer in found))
    blocks = f"repeated blocks 0 to {max(existing)}" if existing else "no repeated blocks"
    if not indices <= existing:
        raise TargetError(
            f"layers={sorted(indices)}: the model has {blocks}",
            fix="Give indices of repeated blocks, counted from 0",
            argument="layers",
        )
    inside = frozenset(layer for layer in layers if layer.blocks & indices)
    if not inside:
        raise TargetError(
            f"layers={sorted(indices)} leaves none of the layers that {source} chooses",
            expected=f"The model has {blocks}, and layers= keeps only what lies in those given",
            fix="Choose other blocks, or attach an adapter of its own to these layers",
            argument="layers",
            layers=sorted(layer.path for layer in layers),
        )
    return inside


# --- 3. what cannot be reached


def _refuse_uncalled(groups: Iterable[Group]) -> None:
    """An error if an adapter would silently do nothing on some of the layers."""
    chosen = frozenset().union(*(group.layers for group in groups))
    uncalled = sorted(layer.path for layer in chosen if not layer.is_called)
    if uncalled:
        raise TargetError(
            "hooks never run on these layers, because their parent (nn.MultiheadAttention) reads "
            "their weight without calling them",
            details=uncalled,
            fix="Leave them out with exclude=",
            argument="targets",
            layers=uncalled,
        )


def _refuse_claimed_twice(groups: Sequence[Group]) -> None:
    """An error if two patterns of a recipe give one layer different variants."""
    claimed: dict[Layer, Group] = {}
    for group in groups:
        for layer in group.layers:
            first = claimed.setdefault(layer, group)
            if first.variant is not group.variant:
                raise TargetError(
                    f"{layer.path} is chosen by {first.source} and by {group.source}",
                    expected="In a recipe, every layer has one variant",
                    fix="Make one of the two patterns narrower",
                    argument="recipe",
                    layers=(layer.path,),
                )


def _passed_over(
    groups: Sequence[Group], found: Sequence[Layer], others: Sequence[OtherWeight]
) -> frozenset[OtherWeight]:
    """The weights that a pattern matches and cannot reach; an error if they are a large part."""
    matched: set[OtherWeight] = set()
    for group in groups:
        if group.pattern is not None:
            adapted = {path for layer in group.layers for path in layer.paths}
            matches = [
                weight
                for weight in others
                if weight.has_path_like(group.pattern) and weight.holder not in adapted
            ]
            bare = [w for w in matches if w.is_bare and w.in_blocks]
            if hold_much(bare, found, others):
                refuse_unreachable_weights(group.source, bare)
            matched.update(matches)
    return frozenset(matched)


# --- 4. the variant of each layer


def _in_model_order(groups: Iterable[Group], found: Sequence[Layer]) -> dict[Layer, Variant]:
    variants = {layer: group.variant for group in groups for layer in group.layers}
    return {layer: variants[layer] for layer in found if layer in variants}


def _with_overrides(
    variants: dict[Layer, Variant], changes: Iterable[tuple[re.Pattern[str], Mapping[str, Any]]]
) -> dict[Layer, Variant]:
    """Every layer's variant with the hyperparameters that `overrides` changes there."""
    changed: dict[Layer, dict[str, Any]] = {}
    for pattern, fields in changes:
        matches = [layer for layer in variants if layer.has_path_like(pattern)]
        if not matches:
            raise no_match("overrides", pattern, list(variants))
        for layer in matches:
            changed.setdefault(layer, {}).update(fields)
    return {
        layer: _changed(variant, changed[layer]) if layer in changed else variant
        for layer, variant in variants.items()
    }


def _changed(variant: Variant, fields: Mapping[str, Any]) -> Variant:
    given = variant.model_dump(include=variant.model_fields_set)
    return validated(type(variant), {**given, **fields})
