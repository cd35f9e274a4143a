"""The documentation is the code's: its examples run, and it names every public thing."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite import cli
from lora_lite.plugins import variant_class
from lora_lite_benchmark import cli as benchmark_cli
from lora_lite_benchmark.results import Measurements
from lora_lite_benchmark.table import COLUMNS
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/decisions/*.md")),
]
READMES = [
    ROOT / "core/README.md",
    ROOT / "benchmark/README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def examples(page: Path) -> list[str]:
    return EXAMPLE.findall(page.read_text())


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(page: Path, names: dict[str, object]) -> None:
    for number, code in enumerate(examples(page)):
        exec(compile(code, f"{name_of(page)}[{number}]", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name_of)
def test_every_example_of_the_pages_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's examples run from top to bottom, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    run(page, {"__name__": "example"})


@pytest.mark.parametrize("page", [page for page in READMES if examples(page)], ids=name_of)
def test_every_example_of_the_readmes_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama
) -> None:
    """A package's README speaks of `model`, the reader's own, and of `batches` of its inputs; here both are small."""
    monkeypatch.chdir(tmp_path)
    model: nn.Module = tiny_llama(hidden_size=64, intermediate_size=128)
    tokens = torch.randint(32, (4, 16))
    run(
        page,
        {
            "__name__": "example",
            "ll": ll,
            "torch": torch,
            "model": model,
            "batches": [{"input_ids": tokens}] * 8,
        },
    )


def test_the_api_page_has_every_public_name_and_no_other() -> None:
    documented = re.findall(
        r"^::: lora_lite\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    assert sorted(documented) == sorted(ll.__all__)


def test_the_contract_page_has_every_member_of_the_contract() -> None:
    page = (ROOT / "docs/contract.md").read_text()
    own = [
        name
        for name in vars(ll.Variant)
        if not name.startswith(("_", "model_")) and name != "lora_lite_variant"
    ]
    specs = list(inspect.signature(ll.TensorSpec).parameters)
    site = [
        name for name in vars(ll.Site) if not name.startswith("_") and name != "weight_was_read"
    ]
    kind = [
        name
        for name in vars(ll.LayerKind)
        if not name.startswith("_") and name != "lora_lite_layer_kind"
    ]
    missing = [name for name in own + specs + site + kind if not re.search(rf"`{name}[(`]", page)]
    assert not missing


def test_the_contract_page_gives_every_method_its_arguments() -> None:
    page = (ROOT / "docs/contract.md").read_text()
    for name, member in vars(ll.Variant).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        if name.startswith("_") or name == "lora_lite_variant" or not inspect.isfunction(function):
            continue
        arguments = [
            argument
            for argument in inspect.signature(function).parameters
            if argument not in ("self", "cls")
        ]
        assert f"`{name}({', '.join(arguments)})`" in page


@pytest.mark.parametrize("name", sorted(ll.variants()))
def test_every_variant_has_its_page_with_every_field_and_default(name: str) -> None:
    """The README of a variant's package lists its fields with their defaults and names its paper; the site shows it."""
    cls = variant_class(name)
    package = ll.variants()[name].distribution.removeprefix("lora-lite-")
    page = (ROOT / "plugins" / package / "README.md").read_text()
    for field, info in cls.model_fields.items():
        row = re.search(rf"^\| `{field}` \|.*$", page, re.MULTILINE)
        assert row, f"{name}: no row for {field}"
        default = f'"{info.default}"' if isinstance(info.default, str) else str(info.default)
        assert re.search(rf"\| `?{re.escape(default)}`?(:[^|]*)? \|", row.group()), (
            f"{name}: {field} has default {default}, the page says {row.group()}"
        )
    assert "arXiv:" in page
    assert (
        f'--8<-- "plugins/{package}/README.md"'
        in (ROOT / "docs/variants" / f"{package}.md").read_text()
    )


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs/commands.md").read_text()
    actions = cli._parser()._subparsers._group_actions  # type: ignore[union-attr]
    for command in actions[0].choices:  # type: ignore[union-attr]
        assert f"`lora-lite {command}" in page


def test_every_command_and_figure_of_the_benchmark_is_documented() -> None:
    page = (ROOT / "benchmark/README.md").read_text()
    commands = benchmark_cli._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert not [command for command in commands if f"lora-lite-bench {command}" not in page]
    names = {
        name.removesuffix("_low").removesuffix("_high")
        for column in COLUMNS
        for name in column.names
    }
    names |= set(Measurements.model_fields)
    assert not [name for name in names if f"`{name}`" not in page]


def test_every_variant_is_in_the_readme() -> None:
    table = (
        (ROOT / "README.md")
        .read_text()
        .split("<!-- variants -->")[1]
        .split("<!-- /variants -->")[0]
    )
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == sorted(ll.variants())


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [
        page
        for page in (ROOT / "docs").rglob("*.md")
        if str(page.relative_to(ROOT / "docs")) not in menu
    ]
