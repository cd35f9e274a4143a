"""From a name to a format, and from a path to the format that recognises it.

The core's own "merged" is found as the others are. A plugin is imported when it is first asked for;
an adapter's own file asks for none.
"""

from importlib import metadata
from pathlib import Path

from lora_lite.errors import AdapterFileError, PluginError
from lora_lite.formats import Format
from lora_lite.plugins import (
    entry_points_of,
    first_party,
    load_class,
    manager,
    not_installed,
    only_one,
    register,
    unusable,
)

FORMATS = "lora_lite.formats"
OURS = metadata.EntryPoint("merged", "lora_lite.merged_checkpoint:MergedCheckpoint", FORMATS)


def formats() -> list[str]:
    """The names of the installed formats, without importing any of them."""
    return sorted(_entry_points())


def format_named(name: str) -> Format:
    """The installed format of this name, imported when it is first asked for.

    Raises:
        PluginError: none is installed, or it cannot be used.
    """
    loaded: Format | None = manager.hook.lora_lite_format(name=name)
    if loaded is not None:
        return loaded
    installed = _entry_points()
    if name not in installed:
        raise not_installed(PluginError, "format", name, sorted(installed), first_party("formats"))
    point = only_one(installed[name])
    cls = load_class(point, Format)  # type: ignore[type-abstract]
    if cls.name != name:
        raise unusable(
            point,
            f"gives {cls.__qualname__}, whose name is {cls.name!r}",
            fix="Its author must make the entry point and the class's `name` agree",
        )
    register(cls(), point)
    return format_named(name)


def format_of(path: Path) -> Format | None:
    """The installed format that recognises a path, or None.

    Raises:
        PluginError: none does, and one of them cannot be used.
        AdapterFileError: several do.
    """
    found: list[Format] = []
    broken: list[PluginError] = []
    for name in formats():
        try:
            one = format_named(name)
        except PluginError as error:
            broken.append(error)
        else:
            if one.recognises(path):
                found.append(one)
    if len(found) > 1:
        names = " and ".join(repr(one.name) for one in found)
        raise AdapterFileError(
            f"{path} is recognised by the formats {names}",
            fix="Uninstall the package of one of them",
            path=str(path),
        )
    if broken and not found:
        raise broken[0]
    return found[0] if found else None


def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    installed = entry_points_of(FORMATS)
    return {**installed, OURS.name: [OURS, *installed.get(OURS.name, [])]}
