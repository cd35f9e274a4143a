"""What `attach` is asked for: one variant, or a recipe with a variant for each group of layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lite.arguments import pattern, refuse_fields_beside
from lora_lite.errors import AdapterError, FieldError
from lora_lite.fields import make_variant
from lora_lite.variant import Variant


@dataclass(frozen=True)
class Recipe:
    """The variants of one adapter.

    Attributes:
        variants: in the order given.
        patterns: the regular expression that chooses the layers of each; empty if there is one
            variant, whose layers `targets` chooses.
    """

    variants: tuple[Variant, ...]
    patterns: tuple[re.Pattern[str], ...] = ()

    @property
    def variant(self) -> Variant:
        """The variant, if there is only one.

        Raises:
            AdapterError: there are several.
        """
        if len(self.variants) > 1:
            raise AdapterError(
                "this is a recipe of several variants, so there is no single `variant`",
                fix="Ask `sites`, which has the variant of each layer",
            )
        return self.variants[0]

    def __str__(self) -> str:
        if not self.patterns:
            return ", ".join(str(variant) for variant in self.variants)
        pairs = zip(self.patterns, self.variants, strict=True)
        return ", ".join(f"{chosen.pattern!r}: {variant}" for chosen, variant in pairs)


def make_recipe(variant: object, fields: Mapping[str, Any]) -> Recipe:
    """A recipe from what users give to `attach`: a variant with its fields, or a mapping.

    Raises:
        UnknownVariantError, PluginError, FieldError: from the variants.
        TargetError: a pattern is not a regular expression.
    """
    if not isinstance(variant, Mapping):
        return Recipe((make_variant(variant, fields),))
    refuse_fields_beside("a recipe", fields)
    if not variant:
        raise FieldError(
            "the recipe is empty",
            expected="It is {regular expression: variant}, such as {'q': 'lora'}",
        )
    expressions = tuple(pattern(expression, "recipe") for expression in variant)
    return Recipe(tuple(_one(given) for given in variant.values()), expressions)


def _one(given: object) -> Variant:
    """One variant of a recipe: a name, a name with fields, or an instance."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
        name, fields = given
        return make_variant(name, fields)
    return make_variant(given, {})
