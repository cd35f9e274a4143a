"""From a name to a variant, and from a module to the layer kind that can read it.

A plugin is a class that a distribution names in its entry points. It goes through four steps:

1. `variants` and `provider` list what is installed. They read metadata and import nothing.
2. `variant_class` and `kind_of` load a plugin when it is first asked for, and only that one, so
   that one broken plugin does not break the others.
3. `load_class` imports it, after checks that turn each mistake of its author into an error of its
   own.
4. The plugin manager of pluggy keeps what was loaded, and is asked through the hooks of
   `lora_lite.hookspecs`.

pluggy could load entry points by itself. It would skip the second of two plugins with the same name
without a word, and would let the errors of a broken plugin through as they are.
"""

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Literal, TypeVar

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from torch import nn

from lora_lite import hookspecs, kinds
from lora_lite.errors import PluginError, UnknownVariantError, did_you_mean
from lora_lite.layers import LayerKind
from lora_lite.variant import Variant

CORE = "lora-lite-core"
VARIANTS = "lora_lite.variants"
LAYERS = "lora_lite.layers"

T = TypeVar("T")

manager = pluggy.PluginManager("lora_lite")
manager.add_hookspecs(hookspecs)
# pluggy asks the last one first, and most layers are of the first kind.
for _kind in reversed(kinds.BUILT_IN):
    manager.register(_kind, name=type(_kind).__name__)

# Held while a plugin is registered, never while one is imported: another thread could be waiting
# for this lock while it holds Python's import lock of the same module.
_registration_lock = threading.Lock()


# --- 1. what is installed


@dataclass(frozen=True)
class VariantInfo:
    """An installed variant, described from metadata alone: nothing was imported to make this.

    Attributes:
        name: what `attach` takes.
        distribution: the installed package that provides the variant.
        version: of that package.
        target: where the class is, as `module:Class`.
    """

    name: str
    distribution: str
    version: str
    target: str


def variants() -> dict[str, VariantInfo]:
    """The installed variants by name, without importing any of them.

    If several distributions provide the same name, it is listed once with all of them, separated
    by slashes; `attach` refuses it.
    """
    installed = entry_points_of(VARIANTS)
    return {name: _variant_info(name, installed[name]) for name in sorted(installed)}


def _variant_info(name: str, entry_points: Sequence[metadata.EntryPoint]) -> VariantInfo:
    return VariantInfo(
        name=name,
        distribution=" / ".join(_distribution(point) for point in entry_points),
        version=" / ".join(_version(point) for point in entry_points),
        target=" / ".join(point.value for point in entry_points),
    )


def provider(cls: type[Variant]) -> tuple[str, str]:
    """The distribution that provides a variant class, and its version.

    For a class that is not an installed plugin (written in a notebook, say): its module and "".
    """
    for point in entry_points_of(VARIANTS).get(cls.name, []):
        module = sys.modules.get(point.module)
        if getattr(module, point.attr, None) is cls:
            return _distribution(point), _version(point)
    return cls.__module__, ""


def entry_points_of(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """The installed entry points of a group by name: several where distributions share a name.

    A distribution that Python finds twice, such as an editable install on two paths, counts once.
    """
    by_name: dict[str, list[metadata.EntryPoint]] = {}
    seen = set()
    for point in metadata.entry_points(group=group):
        source = (point.name, point.value, _distribution(point), _version(point))
        if source not in seen:
            seen.add(source)
            by_name.setdefault(point.name, []).append(point)
    return by_name


@cache
def _layer_entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Those for layer kinds, read once: `kind_of` is asked about every module of a model."""
    return entry_points_of(LAYERS)


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"


def _version(point: metadata.EntryPoint) -> str:
    return point.dist.version if point.dist else "?"


# --- 2. what is asked for


def variant_class(name: str) -> type[Variant]:
    """The class of an installed variant, imported when it is first asked for.

    Raises:
        UnknownVariantError: no installed distribution provides `name`.
        PluginError: one does, but it cannot be used.
    """
    loaded: type[Variant] | None = manager.hook.lora_lite_variant(name=name)
    if loaded is not None:
        return loaded
    installed = entry_points_of(VARIANTS)
    if name not in installed:
        raise not_installed(
            UnknownVariantError, "variant", name, sorted(installed), first_party("variants")
        )
    point = only_one(installed[name])
    cls = load_class(point, Variant)
    if cls.name != name:
        raise unusable(
            point,
            f"gives {cls.__qualname__}, whose name is {cls.name!r}",
            fix="Its author must make the entry point and `class ...(Variant, name=...)` agree",
        )
    register(cls, point)
    return cls


def kind_of(module: nn.Module) -> LayerKind | None:
    """The layer kind that can read `module`, or None.

    A plugin for layer kinds is named after the root package of the layers, and is imported when a
    model first holds a module from there.

    Raises:
        PluginError: that plugin cannot be used.
    """
    package = type(module).__module__.partition(".")[0]
    entry_points = _layer_entry_points().get(package)
    if entry_points and not manager.has_plugin(_plugin_name(entry_points[0])):
        point = only_one(entry_points)
        cls = load_class(point, LayerKind)  # type: ignore[type-abstract]
        register(cls(), point)
    kind: LayerKind | None = manager.hook.lora_lite_layer_kind(module=module)
    return kind


def register(plugin: object, point: metadata.EntryPoint) -> None:
    """Hand a loaded plugin to pluggy, unless another thread was first."""
    name = _plugin_name(point)
    with _registration_lock:
        if not manager.has_plugin(name):
            manager.register(plugin, name=name)


def _plugin_name(point: metadata.EntryPoint) -> str:
    """What pluggy calls the plugin: a variant and a layer kind may share a name."""
    return f"{point.group}:{point.name}"


def not_installed(
    error: type[PluginError],
    what: str,
    name: str,
    installed: Sequence[str],
    ours: Mapping[str, str],
) -> PluginError:
    """The error for a name that is not installed: how to install it, or what was probably meant.

    Args:
        error: its class.
        what: "variant" or "format".
        name: that was asked for.
        installed: the names that are.
        ours: the distribution of every one of this project, installed or not.
    """
    listed = f"The installed {what}s are {', '.join(installed)}"
    expected = listed if installed else f"No {what} is installed"
    if name in ours:
        return error(
            f"{what} {name!r} is not installed",
            expected=expected,
            fix=f"To install it: pip install {ours[name]}",
            plugin=name,
            distributions=(ours[name],),
        )
    return error(
        f"there is no {what} {name!r}",
        expected=expected,
        fix=did_you_mean(name, [*installed, *ours]),
        plugin=name,
    )


def first_party(what: Literal["variants", "formats"]) -> dict[str, str]:
    """The distribution of every variant or format of this project, by name, installed or not.

    Only these are ever named in an install command: what a stranger uploads under a name that
    somebody mistyped must not be one `pip install` away.
    """
    text = resources.files("lora_lite").joinpath("first_party.json").read_text(encoding="utf-8")
    distributions: dict[str, dict[str, str]] = json.loads(text)
    return distributions[what]


# --- 3. load one plugin


def only_one(entry_points: Sequence[metadata.EntryPoint]) -> metadata.EntryPoint:
    """The one entry point of a name; it is an error if several distributions provide it."""
    first, *others = entry_points
    if others:
        places = " and by ".join(_describe(point) for point in entry_points)
        raise PluginError(
            f"{first.name!r} is provided twice, by {places}",
            fix="Uninstall one of them",
            plugin=first.name,
            distributions=tuple(_distribution(point) for point in entry_points),
        )
    return first


def load_class(point: metadata.EntryPoint, base: type[T]) -> type[T]:
    """Import the class that an entry point names.

    Raises:
        PluginError: the class is made for another version of the core, fails on import, or is no
            subclass of `base`.
    """
    requirement = _core_requirement(point)
    core = metadata.version(CORE)
    versions = f"It asks for {requirement or f'any {CORE}'}, and {CORE} {core} is installed"
    if requirement and not requirement.specifier.contains(core, prereleases=True):
        raise unusable(
            point,
            "is made for another version of the core",
            expected=versions,
            fix="Install another version of one of the two",
        )
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:
        raise unusable(
            point,
            f"is installed but fails on import: {type(error).__name__}: {error}",
            expected=versions,
            fix="If it needs a package that is missing, install that; else tell its author",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise unusable(
            point,
            f"gives {loaded!r}",
            expected=f"Expected a subclass of lora_lite.{base.__name__}",
            fix="Its author must correct the entry point",
        )
    return loaded


def unusable(
    point: metadata.EntryPoint, problem: str, *, expected: str = "", fix: str = ""
) -> PluginError:
    """The error for one plugin, which names its distribution."""
    return PluginError(
        f"{_describe(point)} {problem}",
        expected=expected,
        fix=fix,
        plugin=point.name,
        distributions=(_distribution(point),),
    )


def _core_requirement(point: metadata.EntryPoint) -> Requirement | None:
    """What the plugin's distribution asks of the core's version; None if it asks nothing."""
    lines = point.dist.requires if point.dist else None
    for line in lines or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # pip has refused or accepted it already
        is_core = canonicalize_name(requirement.name) == CORE
        # `lora-lite-core[testing]; extra == "test"` holds only for those who ask for the extra.
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_core and applies:
            return requirement
    return None


def _describe(point: metadata.EntryPoint) -> str:
    """An entry point and its origin: `lora_lite.variants 'lora' of lora-lite-lora 0.1.0 (...)`."""
    origin = f"{_distribution(point)} {_version(point)} ({point.value})"
    return f"{point.group} {point.name!r} of {origin}"
