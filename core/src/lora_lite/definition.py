"""Mistakes in the definition of a variant class, found when Python makes the class.

1. `VariantMeta` makes instances, from numpy's numbers as well.
2. `check_fields` checks the names of its fields.
3. `check_definition` checks its name, its class variables and its methods.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from types import NoneType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from lora_lite.arguments import plain_numbers
from lora_lite.errors import VariantDefinitionError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    from lora_lite.variant import Variant
else:
    ModelMetaclass = type(BaseModel)

# `attach(model, "lora", seed=1)` must not be ambiguous.
ATTACH_ARGUMENTS = frozenset(
    {"name", "targets", "exclude", "layers", "overrides", "calibration", "dtype", "seed"}
)
IDENTITIES = ("exact", "rounding", "none")
# Types of values that an author may write without an annotation.
PLAIN_VALUES = (bool, int, float, str, tuple, list, dict, set, frozenset, NoneType)
SCALED_METHODS = ("prepare", "delta_input", "delta_output")


# --- 1. instances


class VariantMeta(ModelMetaclass):
    """Makes variants."""

    def __call__(cls, /, *args: Any, **fields: Any) -> Any:  # noqa: N805 (of a metaclass)
        """An instance; numbers of numpy are taken as Python's."""
        model: Any = cls
        if not model.__pydantic_complete__:
            # Annotations may have names of the caller's, whose frame is the third from there.
            model.model_rebuild(raise_errors=False, _parent_namespace_depth=3)
        return super().__call__(*args, **plain_numbers(fields))


# --- 2. fields


def check_fields(cls: type[Variant], contract: type[Variant]) -> None:
    """Check the names of a new class's fields.

    Raises:
        VariantDefinitionError: a field is called as an argument of attach or a member of `Variant`.
    """
    for field, annotation in inspect.get_annotations(cls).items():
        if "ClassVar" in str(annotation):
            continue
        if field in ATTACH_ARGUMENTS:
            raise _error(
                cls, f"the field {field!r} is an argument of attach()", fix="Give it another name"
            )
        if hasattr(contract, field):
            raise _error(
                cls,
                f"the field {field!r} shadows Variant.{field}",
                fix="Give it another name; to override a member of Variant, write a method or a "
                "ClassVar",
            )


# --- 3. what the contract asks for


def check_definition(cls: type[Variant], contract: type[Variant]) -> None:
    """Check a new subclass of `Variant`.

    Args:
        cls: the new class. Without a name it is a base of other variants, and may leave methods
            out.
        contract: `Variant` itself.

    Raises:
        VariantDefinitionError: something is written against the contract.
    """
    _check_name(cls)
    _check_annotations(cls, contract)
    _check_class_variables(cls)
    _check_spelling(cls, contract)
    _check_scale(cls)
    if cls.name:
        _check_methods(cls, contract)


def _check_name(cls: type[Variant]) -> None:
    if cls.name and not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):
        raise _error(
            cls, f"name={cls.name!r} is not lower_snake_case", fix="Choose a name such as my_method"
        )
    generic = cls.__pydantic_generic_metadata__
    if generic["origin"] or generic["parameters"]:
        raise _error(cls, "a variant cannot be generic", expected="Generic models do not pickle")


def _check_annotations(cls: type[Variant], contract: type[Variant]) -> None:
    """A value without an annotation is no field, although its author may think so."""
    annotated = inspect.get_annotations(cls)
    for name, value in vars(cls).items():
        is_value = isinstance(value, PLAIN_VALUES) and not name.startswith("_")
        if is_value and name not in annotated and not hasattr(contract, name):
            raise _error(
                cls,
                f"{name} = {value!r} has no annotation",
                fix=f"Write `{name}: {type(value).__name__} = {value!r}` for a field, or annotate "
                "it as a ClassVar",
            )


def _check_class_variables(cls: type[Variant]) -> None:
    lr = cls.recommended_lr
    if not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise _error(cls, f"recommended_lr={lr!r} is not a positive number")
    identity = vars(cls).get("identity")
    if isinstance(identity, str) and identity not in IDENTITIES:
        raise _error(cls, f"identity={identity!r}", expected=f"It is one of {IDENTITIES}")
    for pattern in cls.default_targets:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise _error(
                cls, f"default_targets has {pattern!r}, which is no regular expression: {error}"
            ) from None


def _check_spelling(cls: type[Variant], contract: type[Variant]) -> None:
    """A method with a misspelt name is never called, and nobody would notice."""
    names = [name for name in vars(contract) if not name.startswith("_")]
    for name, member in vars(cls).items():
        own_method = inspect.isfunction(member) and not name.startswith("_")
        if not own_method or hasattr(contract, name):
            continue
        for meant in names:
            if _nearly_the_same(name, meant):
                raise _error(
                    cls,
                    f"the method {name!r} is not part of the contract",
                    expected=f"Its name is nearly {meant!r}, so it is probably misspelt",
                    fix=f"Rename it; a helper of your own could be called _{name}",
                )


def _nearly_the_same(name: str, meant: str) -> bool:
    """Whether two names differ by one letter: added, left out, or exchanged."""
    matcher = difflib.SequenceMatcher(a=name, b=meant, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return max(len(name), len(meant)) - same <= 1


def _check_scale(cls: type[Variant]) -> None:
    """A method that takes the scale itself must have a parameter for it."""
    if not cls.takes_scale:
        return
    for name in SCALED_METHODS:
        method = vars(cls).get(name)
        if inspect.isfunction(method) and not _takes_keyword(method, "scale"):
            raise _error(
                cls,
                f"takes_scale is set, and {name} has no parameter `scale`",
                fix="Add `*, scale: float = 1.0` to its parameters; subclass ScaledVariant to have "
                "this checked by a type checker",
            )


def _takes_keyword(method: Any, keyword: str) -> bool:
    parameters = inspect.signature(method).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any or keyword in parameters


def _check_methods(cls: type[Variant], contract: type[Variant]) -> None:
    def is_default(method: str) -> bool:
        return bool(getattr(cls, method).__module__ == contract.__module__)

    missing = [name for name in ("tensors", "init") if is_default(name)]
    if is_default("delta_input") and is_default("delta_output"):
        missing.append("delta_output (or delta_input)")
    if cls.detached and is_default("prepare"):
        raise _error(
            cls,
            f"detached={cls.detached!r} names prepared tensors, and there is no `prepare`",
            fix="Write `prepare`, or leave `detached` out",
        )
    if missing:
        raise _error(
            cls,
            f"{' and '.join(missing)} must be written",
            expected="A variant has tensors, init and at least one delta",
            fix="A base class of several variants is made without a name",
        )


def _error(
    cls: type[Variant], problem: str, *, expected: str = "", fix: str = ""
) -> VariantDefinitionError:
    return VariantDefinitionError(
        f"{cls.__qualname__}: {problem}", expected=expected, fix=fix, class_name=cls.__qualname__
    )
