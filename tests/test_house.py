"""The house: the public names, the arrows between files, and how long a file may be."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

import lora_lite
import pytest
from lora_lite import author, plugins
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core/src/lora_lite"
SOURCES = [CORE, *sorted(ROOT.glob("plugins/*/src")), ROOT / "benchmark/src"]
MODULES = sorted(path for folder in SOURCES for path in folder.rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*/pyproject.toml"))

LONGEST = 350


# --- how long a file may be


def test_a_file_is_one_idea() -> None:
    """No source file has more than 350 lines, blank ones and comments included."""
    assert len(MODULES) > 100
    too_long = {}
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST:
            too_long[str(path.relative_to(ROOT))] = lines
    assert not too_long


# --- names


def documented(module: ModuleType) -> list[str]:
    """The names of `__all__` that have no docstring. Aliases of types cannot have one."""
    aliases = {"Rng", "Tensors"}
    return [
        name for name in module.__all__ if not getattr(module, name).__doc__ and name not in aliases
    ]


def test_users_names() -> None:
    """`lora_lite.__all__` is what the users' page lists: sorted, documented, and no more."""
    assert len(lora_lite.__all__) == 29
    assert sorted(lora_lite.__all__, key=lambda n: (n.islower(), n)) == lora_lite.__all__
    assert not documented(lora_lite)


def test_authors_names() -> None:
    """`lora_lite.author.__all__` is everything public of that page: sorted and documented."""
    public = {
        name
        for name, value in vars(author).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(author.__all__)
    assert sorted(author.__all__, key=lambda n: (n.islower(), not n.isupper(), n)) == author.__all__
    assert not documented(author)


def test_no_name_is_public_twice_or_unknown() -> None:
    """What `lora_lite` has is the users' or the authors'; both have the errors of calibration."""
    modules = {path.stem for path in CORE.iterdir()}
    public = {name for name in vars(lora_lite) if not name.startswith("_") and name not in modules}
    users, authors = set(lora_lite.__all__), set(author.__all__)
    assert public - users <= authors
    assert users & authors == {"CalibrationError"}


# Documented before there was a namespace for authors.
OLD_NAMES = """
Adapter AdapterError AdapterFileError BaseMismatchError CalibrationError CheckError FieldError
LayerKind LayerKindError LoraLiteError MisfitError Observer Plan PluginError Report Rng Site
SiteError TargetError TensorSpec Tensors UnknownVariantError Variant VariantContractError
VariantDefinitionError VariantInfo adapters attach check check_rank detach load plan save
top_r_svd variants
"""


def test_old_names_are_still_there() -> None:
    """Every name that was documented in `lora_lite` before is importable from there."""
    missing = [name for name in OLD_NAMES.split() if not hasattr(lora_lite, name)]
    assert not missing
    for name in author.__all__:
        old = getattr(lora_lite, name, getattr(author, name))
        assert old is getattr(author, name), name


def test_every_error_has_one_root() -> None:
    """`except ll.LoraLiteError` catches whatever the library raises on purpose."""
    names = {
        name for page in (lora_lite, author) for name in page.__all__ if name.endswith("Error")
    }
    assert len(names) == 15
    found = [getattr(lora_lite, name) for name in names]
    assert all(issubclass(error, lora_lite.LoraLiteError) for error in found)


# --- arrows


def imports(path: Path) -> Iterator[str]:
    """What a file imports at its top, with its module: `lora_lite.errors.AdapterError`.

    What is imported for type checkers alone stands in an `if`, and is left out.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(package: Path) -> dict[str, set[str]]:
    """For each module of a package, those of the same package that it imports at its top."""
    paths = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = {_module(imported, paths) for imported in imports(path)}
        graph[name] = found - {"", name}
    return graph


def _module(imported: str, known: Collection[str]) -> str:
    """The module that an import runs: the longest part of the name that is one; "" if none is."""
    while imported and imported not in known:
        imported = imported.rpartition(".")[0]
    return imported


def a_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, in order; empty if there are none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            circle = visit(other, [*way, name])
            if circle:
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        circle = visit(name, [])
        if circle:
            return circle
    return []


def test_a_circle_is_found() -> None:
    """The search itself, also behind a part without one."""
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert a_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "package",
    [path for src in SOURCES[1:] for path in src.iterdir()] + [CORE],
    ids=lambda p: p.name,
)
def test_no_circle_between_files(package: Path) -> None:
    """The arrows between the files of a package go one way."""
    graph = arrows(package)
    assert package.name in graph
    assert a_circle(graph) == []


def test_the_core_names_no_plugin() -> None:
    """No module of the core imports a plugin, transformers or the benchmark at its top."""
    others = ("lora_lite_", "transformers", "peft", "datasets", "accelerate", "pytest")
    for path in CORE.rglob("*.py"):
        found = [name for name in imports(path) if name.startswith(others)]
        assert not found or "testing" in path.parts, f"{path}: {found}"


# --- metadata


def project(path: Path) -> dict[str, object]:
    """The `[project]` table of a pyproject.toml."""
    table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return table


def test_the_install_hints_are_the_plugins_own_words() -> None:
    """first_party.json agrees with the entry points and names of the plugins in this repository.

    So what an error tells users to install is never another's distribution.
    """
    declared: dict[str, dict[str, object]] = {"formats": {}, "variants": {}}
    for path in PLUGINS:
        table = project(path)
        points = table.get("entry-points", {})
        for what, found in declared.items():
            names = points.get(f"lora_lite.{what}", {})  # type: ignore[attr-defined]
            found.update(dict.fromkeys(names, table["name"]))
    stored = json.loads((CORE / "first_party.json").read_text(encoding="utf-8"))
    assert stored == declared
    for what, found in stored.items():
        assert list(found) == sorted(found)
        assert plugins.first_party(what) == found


def test_the_extra_all_is_every_plugin_of_ours() -> None:
    """`pip install lora-lite-core[all]` brings every folder of plugins/."""
    extras = project(ROOT / "core/pyproject.toml")["optional-dependencies"]
    assert sorted(extras["all"]) == sorted(str(project(path)["name"]) for path in PLUGINS)  # type: ignore[index]
    assert all(
        path.parent.name == str(project(path)["name"]).removeprefix("lora-lite-")
        for path in PLUGINS
    )


def test_the_core_declares_what_it_imports() -> None:
    """Every other package at the top of a core module is a dependency, `packaging` among them.

    The conformance suite has an extra of its own.
    """
    used = {
        name.partition(".")[0]
        for path in CORE.rglob("*.py")
        if "testing" not in path.parts
        for name in imports(path)
    }
    used -= {*sys.stdlib_module_names, "lora_lite"}
    dependencies = [
        Requirement(text) for text in project(ROOT / "core/pyproject.toml")["dependencies"]
    ]  # type: ignore[attr-defined]
    assert {requirement.name for requirement in dependencies} == used
    assert "packaging" in used
    assert all(requirement.specifier for requirement in dependencies)
