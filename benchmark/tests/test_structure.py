"""How the package is built: the modules import one another in one direction, and each is short."""

import ast
import graphlib
from pathlib import Path

import lora_lite_benchmark
import pytest

PACKAGE = "lora_lite_benchmark"
SOURCES = sorted(Path(lora_lite_benchmark.__file__).parent.rglob("*.py"))
LONGEST = 350


def module_name(path: Path) -> str:
    """The dotted name of a file of the package; a package is named by its folder."""
    parts = path.relative_to(Path(lora_lite_benchmark.__file__).parents[1]).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a source imports anywhere: also in a function, and also for
    its types alone.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            # `from package import module` imports the module.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_modules_import_each_other() -> None:
    """The arrows between the modules have no circle, so each can be read after those it imports."""
    modules = {module_name(path): path for path in SOURCES}
    arrows = {
        name: imported(path.read_text(encoding="utf-8"), set(modules)) - {PACKAGE}
        for name, path in modules.items()
    }
    assert sum(map(len, arrows.values())) > 50
    order = list(graphlib.TopologicalSorter(arrows).static_order())
    assert order.index(f"{PACKAGE}.config") < order.index(f"{PACKAGE}.variants")
    assert order.index(f"{PACKAGE}.variants") < order.index(f"{PACKAGE}.preset")


def test_a_circle_would_be_found() -> None:
    """An import for types alone, or one inside a function, closes a circle as any other does."""
    sources = {
        "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n",
        "p.b": "def f():\n    from p import a\n    return a\n",
    }
    arrows = {name: imported(source, set(sources)) for name, source in sources.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_module_is_long(path: Path) -> None:
    """A module holds one idea: none has more than 350 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
