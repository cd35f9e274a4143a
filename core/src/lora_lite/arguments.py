"""What users give to `attach`, `plan` and `load`, checked one argument at a time.

Each function returns the argument in one form, or raises an error that names the argument, repeats
the value and says what is expected.
"""

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lora_lite.errors import AdapterError, FieldError, TargetError

Pattern = str | re.Pattern[str]
Patterns = Pattern | Iterable[Pattern] | None
Indices = int | Iterable[int] | None
Overrides = Mapping[Pattern, Mapping[str, Any]] | None

TRAINABLE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

# Other libraries have a word for "every linear layer" that is no regular expression.
EVERY_LINEAR_LAYER = ("all-linear", "all_linear")


def adapter_name(name: object) -> str:
    """A name that may become a part of attribute names."""
    if not isinstance(name, str) or not name.isidentifier():
        raise AdapterError(
            f"name={name!r} cannot be the name of an adapter",
            expected="A name is made of letters, digits and underscores, and starts with a letter",
        )
    return name


def seed_number(seed: object) -> int:
    """Any whole number, numpy's included."""
    if not is_whole(seed):
        raise AdapterError(f"seed={seed!r} is not a whole number")
    return int(seed)  # type: ignore[call-overload, no-any-return]


def trainable_dtype(dtype: object) -> torch.dtype:
    """A floating-point dtype that optimizers can train, or its name."""
    found = TRAINABLE_DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in TRAINABLE_DTYPES.values():
        raise AdapterError(
            f"dtype={dtype!r} cannot be trained",
            expected=f"The trainable tensors are kept in one of {', '.join(TRAINABLE_DTYPES)}",
        )
    return found


def finite_scale(scale: object) -> float:
    """Any finite number."""
    if not is_number(scale) or not math.isfinite(scale):  # type: ignore[arg-type]
        raise AdapterError(f"scale={scale!r} is not a finite number")
    return float(scale)  # type: ignore[arg-type]


def flag(value: object, argument: str) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise AdapterError(f"{argument}={value!r} is neither True nor False")
    return bool(value)


def patterns(given: object, argument: str) -> list[re.Pattern[str]]:
    """One or several regular expressions, as text or compiled."""
    if isinstance(given, str | re.Pattern):
        given = [given]
    expressions = listed(given)
    if expressions is None:
        raise TargetError(
            f"{argument}={given!r} is neither a regular expression nor a list of them",
            argument=argument,
        )
    return [pattern(expression, argument) for expression in expressions]


def listed(given: object) -> list[Any] | None:
    """The elements of what is given, if it is a collection of several things."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        return None
    try:
        return list(given)
    except TypeError:  # an array without dimensions
        return None


def pattern(given: object, argument: str) -> re.Pattern[str]:
    """One regular expression, as text or compiled."""
    if isinstance(given, re.Pattern) and isinstance(given.pattern, str):
        return given
    if isinstance(given, str) and given in EVERY_LINEAR_LAYER:
        raise TargetError(
            f"{argument}={given!r} is not a regular expression for paths of layers",
            fix="For every linear layer of the repeated blocks, leave targets= out",
            argument=argument,
        )
    if not isinstance(given, str):
        raise TargetError(
            f"{argument}={given!r} is not a regular expression: it is a {type(given).__name__}",
            fix="Give text such as r'q_proj$'",
            argument=argument,
        )
    try:
        return re.compile(given)
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(
            f"{argument}={given!r} is not a regular expression: {error}", argument=argument
        ) from None


def block_indices(layers: object) -> frozenset[int] | None:
    """One or several indices of repeated blocks; None for all of them."""
    if layers is None:
        return None
    indices: list[Any] | None = [layers] if is_whole(layers) else listed(layers)
    if indices and all(is_whole(index) for index in indices):
        return frozenset(map(int, indices))
    raise TargetError(
        f"layers={layers!r} is not an index of a repeated block, nor several",
        fix="Give whole numbers, counted from 0, such as layers=[0, 1]",
        argument="layers",
    )


def override_fields(overrides: object) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """`{regex: {field: value}}` as pairs, in the order given."""
    if overrides is None:
        return []
    if not isinstance(overrides, Mapping):
        raise TargetError(
            f"overrides={overrides!r} is not a mapping",
            expected="It is {regular expression: {field: value}}",
            argument="overrides",
        )
    pairs = []
    for expression, fields in overrides.items():
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise TargetError(
                f"overrides[{expression!r}]={fields!r} does not say which fields to override",
                expected="It is {regular expression: {field: value}}",
                argument="overrides",
            )
        pairs.append((pattern(expression, "overrides"), plain_numbers(fields)))
    return pairs


def plain_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with numpy's numbers as Python's, which pydantic and JSON know."""
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if type(value) in (bool, int, float, str):
        return value
    if is_whole(value):
        return int(value)
    if is_number(value):
        return float(value)
    return value


def is_whole(value: object) -> bool:
    """Whether a value is a whole number. True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number. True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_model(model: object) -> torch.nn.Module:
    """A module."""
    if not isinstance(model, torch.nn.Module):
        raise AdapterError(
            f"the model is a {type(model).__name__}", expected="It must be a torch.nn.Module"
        )
    return model


def refuse_fields_beside(variant: object, fields: Mapping[str, Any]) -> None:
    """An error if hyperparameters are given beside a variant that has its own already."""
    if fields:
        raise FieldError(
            f"{variant} has its fields already, and cannot take {', '.join(fields)} as well",
            fix="Give them when you make it",
            fields=tuple(fields),
        )
