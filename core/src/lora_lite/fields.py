"""From a name and hyperparameters to a validated variant.

1. `make_variant` takes what users write: a name and fields, or an instance.
2. `validated` makes an instance, and turns pydantic's complaints into one `FieldError`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lora_lite.arguments import refuse_fields_beside
from lora_lite.errors import FieldError, did_you_mean
from lora_lite.peft_words import OUR_WAY
from lora_lite.plugins import variant_class
from lora_lite.variant import Variant

# --- 1. what users write


def make_variant(variant: object, fields: Mapping[str, Any]) -> Variant:
    """A variant from its name and hyperparameters, or the instance itself.

    Raises:
        UnknownVariantError, PluginError: from the name.
        FieldError: an unknown field, a value that is not allowed, or fields beside an instance.
    """
    if isinstance(variant, str):
        return validated(variant_class(variant), fields)
    if not isinstance(variant, Variant):
        raise FieldError(
            f"{variant!r} is not a variant",
            expected="A variant is a name such as 'lora', or an instance of a Variant subclass",
        )
    refuse_fields_beside(variant, fields)
    if not variant.name:
        raise FieldError(
            f"{type(variant).__qualname__} has no name",
            fix="Write `class ...(Variant, name='my_method')`",
        )
    return variant


# --- 2. validation


def validated(cls: type[Variant], fields: Mapping[str, Any]) -> Variant:
    """`cls(**fields)`, with all complaints of pydantic as one `FieldError`."""
    try:
        return cls(**fields)
    except ValidationError as error:
        raise _field_error(cls, error) from None


def _field_error(cls: type[Variant], error: ValidationError) -> FieldError:
    complaints = error.errors(include_url=False)
    wrong = [_field(complaint) for complaint in complaints if complaint["loc"]]
    unknown = [_field(complaint) for complaint in complaints if _is_unknown_field(complaint)]
    sentences = "; ".join(_sentence(complaint) for complaint in complaints)
    known = list(cls.model_fields)
    return FieldError(
        f"variant {cls.name!r}: {sentences}",
        expected=_known_fields(known) if unknown else "",
        fix=" ".join(_advice(field, known) for field in unknown).strip(),
        variant=cls.name,
        fields=wrong,
    )


def _field(complaint: Mapping[str, Any]) -> str:
    """The field that pydantic complains about, or "" for several of them together."""
    return ".".join(str(part) for part in complaint["loc"])


def _is_unknown_field(complaint: Mapping[str, Any]) -> bool:
    return bool(complaint["type"] == "extra_forbidden")


def _sentence(complaint: Mapping[str, Any]) -> str:
    field = _field(complaint)
    if _is_unknown_field(complaint):
        return f"there is no field {field!r}"
    return f"{field or 'fields'}={complaint['input']!r}: {complaint['msg']}"


def _known_fields(known: list[str]) -> str:
    return f"Its fields are {', '.join(known)}" if known else "It has no fields"


def _advice(field: str, known: list[str]) -> str:
    """What to write instead of an unknown field."""
    return OUR_WAY.get(field) or did_you_mean(field, known)
