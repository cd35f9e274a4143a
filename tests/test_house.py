"""The house: the public names, and how many lines of code it takes."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import lora_lite
import lora_lite_lora.lora

SILENT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
)  # fmt: skip


def lines_of_code(source: str) -> int:
    """Lines that are not blank, not comment, not docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documented)


def test_lines_of_code_counts_code() -> None:
    """The counter itself: blank lines, comments and docstrings do not count, strings that are code do."""
    source = '"""Module.\n\nMore.\n"""\n\nx = """a\nb"""  # two lines\n# nothing\n\n'
    source += 'def f():\n    """Doc."""\n    return (\n        1\n    )\n'
    assert lines_of_code(source) == 2 + 1 + 3


def test_the_core_is_small() -> None:
    """The core without its conformance suite is at most 1,500 lines of code."""
    root = Path(lora_lite.__file__).parent
    counts = {
        p.name: lines_of_code(p.read_text())
        for p in sorted(root.rglob("*.py"))
        if "testing" not in p.parts
    }
    print(
        *(f"{count:5} {name}" for name, count in counts.items()),
        f"{sum(counts.values()):5} in all",
        sep="\n",
    )
    assert "adapter.py" in counts
    assert sum(counts.values()) <= 1500


def test_a_method_is_one_short_file() -> None:
    """LoRA's whole plugin file is at most 40 lines of code."""
    count = lines_of_code(Path(lora_lite_lora.lora.__file__).read_text())
    print(f"lora.py: {count}")
    assert count <= 40


def test_public_names() -> None:
    """`__all__` is every public name of the package, sorted, and each is there and documented."""
    modules = {p.stem for p in Path(lora_lite.__file__).parent.iterdir()}
    public = {name for name in vars(lora_lite) if not name.startswith("_") and name not in modules}
    assert public == set(lora_lite.__all__)
    assert sorted(lora_lite.__all__, key=lambda n: (n.islower(), n)) == lora_lite.__all__
    aliases = {"Rng", "Tensors"}
    assert not [name for name in public - aliases if not getattr(lora_lite, name).__doc__]


def test_every_error_has_one_root() -> None:
    """`except ll.LoraLiteError` catches whatever the library raises on purpose."""
    errors = [getattr(lora_lite, name) for name in lora_lite.__all__ if name.endswith("Error")]
    assert len(errors) > 10
    assert all(issubclass(error, lora_lite.LoraLiteError) for error in errors)


def test_the_core_names_no_plugin() -> None:
    """Arrows point one way: no module of the core imports a plugin, transformers or the benchmark at its top."""
    for path in Path(lora_lite.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(
                    ("lora_lite_", "transformers", "peft", "datasets", "accelerate")
                ), f"{path}: {name}"
