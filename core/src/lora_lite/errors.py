"""Every error of lora-lite. Each says what was given, what was expected, and the way out."""

import difflib
from collections.abc import Iterable


class LoraLiteError(Exception):
    """The root of every error that lora-lite raises on purpose."""


class VariantDefinitionError(LoraLiteError, TypeError):
    """A `Variant` or `LayerKind` class is written against its contract."""


class VariantContractError(LoraLiteError, RuntimeError):
    """A variant returned something else than it declared: a name, shape, dtype or device."""


class UnknownVariantError(LoraLiteError, LookupError):
    """No installed distribution provides a variant of this name."""


class PluginError(LoraLiteError, ImportError):
    """A plugin is installed but cannot be used: broken, provided twice, or not what its entry point says."""


class FieldError(LoraLiteError, ValueError):
    """A hyperparameter is unknown to the variant or outside its allowed values."""


class TargetError(LoraLiteError, ValueError):
    """The choice of layers is wrong: a pattern without a match, an index out of range, a layer that hooks cannot reach."""


class LayerKindError(TargetError):
    """A layer looks linear, but no installed layer kind can read it."""


class SiteError(LoraLiteError, ValueError):
    """Raised by `Variant.tensors` when the variant does not fit a site.

    Args:
        field: the hyperparameter to blame.
        reason: what is wrong, with the values that would be right.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class MisfitError(LoraLiteError, ValueError):
    """A variant does not fit some of its sites; lists all of them."""


class CalibrationError(LoraLiteError, ValueError):
    """Calibration data is missing, superfluous, empty, or rejected by the model."""


class AdapterError(LoraLiteError, RuntimeError):
    """The model's state does not allow this: a name in use, an adapter already detached, a base that cannot carry one."""


class AdapterFileError(LoraLiteError, ValueError):
    """A file cannot be written, read, or applied to this model."""


class BaseMismatchError(AdapterFileError):
    """The file's tensors were computed from other base weights than this model's."""


class CheckError(LoraLiteError, AssertionError):
    """`check` found hooks that did not fire or parameters without a usable gradient."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'lora'?"` with up to three near names, or an empty string."""
    near = difflib.get_close_matches(given, sorted(set(known)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def bullets(lines: Iterable[str], limit: int = 12) -> str:
    """Indented lines, the first `limit` of them, with a count of the rest."""
    lines = list(lines)
    rest = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in lines[:limit] + rest)
