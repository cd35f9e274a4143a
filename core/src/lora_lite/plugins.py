"""From a name to a validated variant, and from a module to its layer kind: lazily, with errors that tell what to do.

Installed plugins are listed from metadata alone; only the one that is asked for is imported. pluggy holds what was
imported. Its own entry-point loader is not used: it imports everything, stops at the first broken plugin, and skips
duplicates in silence.
"""

import operator
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any, TypeVar

import pluggy
from pydantic import ValidationError
from torch import nn
from torch.torch_version import TorchVersion  # compares versions of anything

from lora_lite import hookspecs, layers
from lora_lite.errors import FieldError, PluginError, UnknownVariantError, did_you_mean
from lora_lite.layers import LayerKind
from lora_lite.variant import Variant

VARIANTS, LAYERS = "lora_lite.variants", "lora_lite.layers"
T = TypeVar("T")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}

# The distributions to name in an install hint.
FIRST_PARTY = {
    name: f"lora-lite-{name}" for name in ("lora", "pissa", "dora", "eva", "hra", "delora")
}
FIRST_PARTY |= {
    "ia3": "lora-lite-ia3",
    "ia3_ff": "lora-lite-ia3",
    "lora_xs": "lora-lite-lora-xs",
    "road": "lora-lite-road",
}
FIRST_PARTY |= {
    f"antipasto{core}": "lora-lite-antipasto" for core in ("", "_gain", "_ablate", "_mix")
}


@dataclass(frozen=True)
class VariantInfo:
    """An installed variant, from metadata alone: nothing was imported to make this.

    Attributes:
        name: what `attach` takes.
        distribution: the installed package that provides it, and its `version`.
        target: where the class is, `module:Class`.
    """

    name: str
    distribution: str
    version: str
    target: str


_manager = pluggy.PluginManager("lora_lite")
_manager.add_hookspecs(hookspecs)
for _kind in layers.BUILT_IN:
    _manager.register(_kind, type(_kind).__name__)


def variants() -> dict[str, VariantInfo]:
    """The installed variants by name, read from metadata without importing any of them.

    A name that several distributions provide is listed once, under all of them; `attach` refuses it.
    """
    sources = {
        name: zip(*map(_source, points), strict=True)
        for name, points in sorted(_entry_points(VARIANTS).items())
    }
    return {name: VariantInfo(name, *map(" / ".join, parts)) for name, parts in sources.items()}


def variant_class(name: str) -> type[Variant]:
    """The class of an installed variant.

    Raises:
        UnknownVariantError: no installed distribution provides `name`.
        PluginError: one does, and cannot be used.
    """
    found: type[Variant] | None = _manager.hook.lora_lite_variant(name=name)
    if found is not None:
        return found
    points = _entry_points(VARIANTS)
    if name not in points:
        raise UnknownVariantError(_not_installed(name, sorted(points)))
    loaded = _load(points[name], Variant)
    if loaded.name != name:
        told = (
            f"{_where(points[name][0])} gives {loaded.__qualname__}, whose name is {loaded.name!r}"
        )
        raise PluginError(
            f"{told}; its author must make the entry point and `class ...(Variant, name=...)` agree"
        )
    # The hook alone, since pluggy would look at every attribute of a pydantic class.
    _manager.register(
        SimpleNamespace(lora_lite_variant=loaded.lora_lite_variant), name=f"{VARIANTS}:{name}"
    )
    return loaded


def make_variant(variant: str | Variant, fields: Mapping[str, Any]) -> Variant:
    """A validated variant from its name and fields, or the instance itself.

    Raises:
        FieldError: an unknown or invalid field; or fields given beside an instance.
    """
    if isinstance(variant, Variant):
        if fields:
            raise FieldError(
                f"{variant} is already made: put {', '.join(fields)} into it instead of into this call"
            )
        if not variant.name:
            raise FieldError(
                f"{type(variant).__qualname__} has no name: write `class ...(Variant, name='my_method')`"
            )
        return variant
    if not isinstance(variant, str):
        raise FieldError(
            f"a variant is a name or an instance of a Variant subclass, not {variant!r}"
        )
    return validated(variant_class(variant), fields)


def validated(cls: type[Variant], fields: Mapping[str, Any]) -> Variant:
    """`cls(**fields)`, with pydantic's complaints turned into a `FieldError` that names variant and fields."""
    try:
        return cls(**fields)
    except ValidationError as error:
        wrong = "; ".join(
            _complaint(detail, list(cls.model_fields)) for detail in error.errors(include_url=False)
        )
        raise FieldError(f"variant {cls.name!r}: {wrong}") from None


def kind_of(module: nn.Module) -> LayerKind | None:
    """The layer kind that can read `module`, or None. Loads the plugin named after the module's root package, if any.

    Raises:
        PluginError: that plugin cannot be used.
    """
    package = type(module).__module__.partition(".")[0]
    points, plugin = _points_once(LAYERS).get(package), f"{LAYERS}:{package}"
    if points and not _manager.has_plugin(plugin):
        _manager.register(_load(points, LayerKind)(), name=plugin)  # type: ignore[type-abstract]
    kind: LayerKind | None = _manager.hook.lora_lite_layer_kind(module=module)
    return kind


def provider(cls: type[Variant]) -> tuple[str, str]:
    """(distribution, version) of a variant class, or its module and "" where it is not installed as a plugin."""
    for point in _entry_points(VARIANTS).get(cls.name, []):
        if getattr(sys.modules.get(point.module), point.attr, None) is cls:
            return _source(point)[:2]
    return cls.__module__, ""


def _entry_points(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """By name; several only where different distributions or objects claim the same name."""
    found: dict[str, dict[tuple[str, ...], metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=group):
        found.setdefault(point.name, {}).setdefault(_source(point), point)
    return {name: list(points.values()) for name, points in found.items()}


_points_once = cache(_entry_points)


def _source(point: metadata.EntryPoint) -> tuple[str, str, str]:
    """(distribution, version, module:Class)."""
    return (
        (point.dist.name, point.dist.version, point.value)
        if point.dist
        else ("an unknown distribution", "?", point.value)
    )


def _where(point: metadata.EntryPoint) -> str:
    return "{} {!r} of {} {} ({})".format(point.group, point.name, *_source(point))


def _load(points: list[metadata.EntryPoint], base: type[T]) -> type[T]:
    """The object of the only one of `points`, a subclass of `base`."""
    point, where = points[0], _where(points[0])
    if len(points) > 1:
        raise PluginError(
            f"{point.name!r} is provided twice, by {' and by '.join(map(_where, points))}; uninstall one of them"
        )
    needs = next(
        (
            n
            for n in (point.dist and point.dist.requires) or ()
            if re.match(r"lora-lite-core(?![\w-])[^;]*$", n)
        ),
        "",
    )
    core = metadata.version("lora-lite-core")
    asks = f"asks for {needs or 'no particular lora-lite-core'}; installed is lora-lite-core {core}"
    if _excludes(needs, core):
        raise PluginError(f"{where} {asks}: install another version of one of the two")
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise PluginError(f"{where} is installed but fails on import: {told}. It {asks}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise PluginError(
            f"{where} gives {loaded!r}; expected a subclass of lora_lite.{base.__name__}"
        )
    return loaded


def _excludes(requirement: str, version: str) -> bool:
    """Whether a bound of `lora-lite-core>=0.1,<0.2` excludes a version. Clauses of another form are left to pip."""
    bounds = re.findall(r"([<>]=?)\s*([\d.]+)", requirement)
    return not all(COMPARE[sign](TorchVersion(version), bound) for sign, bound in bounds)


def _not_installed(name: str, installed: list[str]) -> str:
    have = f"installed: {', '.join(installed)}" if installed else "no variant is installed"
    if name in FIRST_PARTY:
        return f"variant {name!r} is not installed ({have}); pip install {FIRST_PARTY[name]}"
    return f"there is no variant {name!r}{did_you_mean(name, [*installed, *FIRST_PARTY])} ({have})"


def _complaint(detail: Mapping[str, Any], fields: list[str]) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{field or 'fields'}={detail['input']!r}: {detail['msg']}"
    known = f"its fields are {', '.join(fields)}" if fields else "it has no fields"
    return f"there is no field {field!r}{did_you_mean(field, fields)} ({known})"
