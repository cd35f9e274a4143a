"""The documentation agrees with the code: examples run, figures are right, nothing is left out."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import lora_lite as ll
import pytest
import torch
import yaml
from lora_lite import author, cli
from lora_lite.plugins import variant_class
from lora_lite_benchmark import cli as benchmark_cli
from lora_lite_benchmark.results import Measurements
from lora_lite_benchmark.table import COLUMNS
from torch import nn

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *SITE]
READMES = [
    ROOT / "core/README.md",
    ROOT / "benchmark/README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
NEEDS = re.compile(r"^<!-- needs: (\w+) -->$", re.MULTILINE)
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
    """A page's examples run from top to bottom, as a reader would type them. A page about a library
    says so in a comment, and needs it.
    """
    needed = NEEDS.findall(page.read_text())
    for library in needed:
        pytest.importorskip(library, reason=f"{library} is not installed, and the page is about it")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if needed:
            warnings.simplefilter("default")  # what those libraries warn of is not ours
        run(page, {"__name__": "example"})


@pytest.mark.parametrize("page", [page for page in READMES if examples(page)], ids=name_of)
def test_every_example_of_the_readmes_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama
) -> None:
    """A package's README speaks of `model`, the reader's own, and of `batches` of its inputs.

    Here both are small.
    """
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


def test_coming_from_peft_has_an_answer_for_every_argument() -> None:
    """Promise: the page has a row for every field of LoraConfig and argument of get_peft_model."""
    peft = pytest.importorskip("peft")
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    arguments = inspect.signature(peft.get_peft_model).parameters
    page = (ROOT / "docs/from-peft.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    answered = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert {*fields, *arguments} <= answered


def documented(page: str, namespace: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^::: {re.escape(namespace)}\.(\w+)$", text, re.MULTILINE)


def test_the_api_pages_have_every_public_name_and_no_other() -> None:
    """Users' names are on one page, authors' on the other; one that is both may be on both."""
    of_users = documented("api.md", "lora_lite")
    of_authors = documented("authors-api.md", "lora_lite.author")
    assert len(of_users) == len(set(of_users))
    assert sorted(of_authors) == sorted(author.__all__)
    assert set(of_users) <= set(ll.__all__)
    assert set(ll.__all__) <= set(of_users) | set(of_authors)


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
    """The README of a variant's package lists fields with defaults, and names the paper.

    The site shows it.
    """
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
    site = (ROOT / "docs/variants" / f"{package}.md").read_text(encoding="utf-8")
    assert f'--8<-- "plugins/{package}/README.md"\n' in site


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs/commands.md").read_text()
    actions = cli._parser()._subparsers._group_actions  # type: ignore[union-attr]
    for command in actions[0].choices:  # type: ignore[union-attr]
        assert f"`lora-lite {command}" in page


def test_every_command_and_figure_of_the_benchmark_is_documented() -> None:
    page = (ROOT / "benchmark/README.md").read_text()
    commands = benchmark_cli._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert not [command for command in commands if f"lora-lite-bench {command}" not in page]
    names = {name for column in COLUMNS for name in column.names}
    names |= set(Measurements.model_fields)
    names = {re.sub("_(low|high|p)$", "", name) for name in names}
    assert not [name for name in names if f"`{name}`" not in page]


def test_every_variant_is_in_the_readme() -> None:
    table = (
        (ROOT / "README.md")
        .read_text()
        .split("<!-- variants -->")[1]
        .split("<!-- /variants -->")[0]
    )
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == sorted(ll.variants())


# --- the site


def menu() -> list[str]:
    """Every page that the site's menu leads to, in its order."""

    class Loader(yaml.SafeLoader):
        """Takes `!ENV` as the list that it stands before."""

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))
    tree = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def leaves(item: object) -> list[str]:
        if isinstance(item, str):
            return [item]
        below = item.values() if isinstance(item, dict) else item
        return [page for part in below for page in leaves(part)]  # type: ignore[union-attr]

    return leaves(tree)


def test_every_page_is_in_the_menu_once() -> None:
    """A reader can find every page, and no entry leads nowhere."""
    assert sorted(menu()) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in SITE)


def test_every_method_has_a_page_and_is_among_the_methods_to_choose_from() -> None:
    """The page "Which method?" names every installed variant and leads to its page."""
    index = (ROOT / "docs/variants/index.md").read_text(encoding="utf-8")
    for name, variant in ll.variants().items():
        page = variant.distribution.removeprefix("lora-lite-") + ".md"
        assert f"[`{name}`]({page})" in index


@pytest.mark.parametrize("name", sorted(ll.variants()))
def test_the_figures_of_a_method_are_what_plan_says(name: str) -> None:
    """A method's page tells parameters, multiply-accumulates and learning rate as the code does."""
    page = ll.variants()[name].distribution.removeprefix("lora-lite-")
    text = (ROOT / "docs/variants" / f"{page}.md").read_text(encoding="utf-8")
    table = text.partition(f"| `{name}` | formula | 3584 → 1024 |")[2].partition("\n\n")[0]
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3584, 1024, bias=False)])})
    plan = ll.plan(model, name, targets=r"layers\.0$")
    told = dict(re.findall(r"^\| ([\w ]+) \|.*\| ([\d,.]+) \|$", table, re.MULTILINE))
    assert told == {
        "trainable parameters": f"{plan.parameters:,}",
        "MACs per token": f"{plan.macs_per_token:,}",
        "MACs per forward": f"{plan.macs_per_forward:,}",
        "learning rate to start from": str(variant_class(name).recommended_lr),
    }


def script(path: str) -> ModuleType:
    """A file of the repository that is run as a script, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_results_is_that_of_the_table() -> None:
    """`make docs` draws it again: a picture that is older than the table is not published."""
    site_results = script("docs/site_results.py")
    rows = site_results.results((ROOT / "README.md").read_text(encoding="utf-8"))
    drawn = (ROOT / "docs/assets/results.svg").read_text(encoding="utf-8")
    assert drawn == site_results.picture(rows), "run `make docs` and commit the picture"
    # New token rows are for a model whose vocabulary grew, which the task's does not.
    assert {row.name for row in rows} >= {"base", "full", *ll.variants()} - {"tokens"}


FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$`])\$([^$`\n]+)\$(?![\w$])", re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in SITE if "$" in page.read_text(encoding="utf-8")], ids=name_of
)
def test_every_formula_becomes_mathematics(page: Path) -> None:
    """No command is left as text, as the converter leaves one that it does not know."""
    script("docs/site_results.py")
    mathml = script("docs/site_hooks.py").mathml
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for block, inline in FORMULA.findall(text):
        converted = mathml(block or inline, "block" if block else "inline")
        assert converted.startswith("<math")
        assert "\\" not in converted, block or inline


# --- the repository as others find it


def test_every_distribution_is_released_by_its_tag_and_by_no_other() -> None:
    """The release workflow starts at every distribution's tag, and builds the folder it names."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    (pattern,) = workflow[True]["push"]["tags"]  # YAML 1.1 reads the word `on` as true
    tag_of = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
    release = script(".github/distribution_of_tag.py")
    folders = [ROOT / "core", ROOT / "benchmark", *sorted((ROOT / "plugins").glob("*/"))]
    folders = [folder for folder in folders if (folder / "pyproject.toml").is_file()]
    for folder in folders:
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
        name, version = release.field(project, "name"), release.field(project, "version")
        assert tag_of.fullmatch(f"{name}-v{version}")
        assert release.folder_of(f"{name}-v{version}") == folder.relative_to(ROOT)
        with pytest.raises(release.TagError, match=r"raise the version there first"):
            release.folder_of(f"{name}-v9{version}")
    assert len(release.distributions(ROOT)) == len(folders)
    for tag in ("", "v0.1.0", "lora-lite-core", "lora-lite-nowhere-v0.1.0", "lora-lite-core-v"):
        with pytest.raises(release.TagError):
            release.folder_of(tag)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "README.md"])
def test_every_file_that_a_page_of_the_repository_names_exists(page: str) -> None:
    """In backticks or as a link, relative to the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", outside)
    quoted = re.findall(r"`(\.?[\w.-]+(?:/[\w.*-]+)*/?)`", outside)
    paths = [path for path in quoted if "/" in path.strip("/") or path.endswith("/")]
    run = re.findall(r"^\.venv/bin/python -m pytest (\S+)", text, re.MULTILINE)
    named = linked + run + [path for path in paths if not path.startswith((".venv", "lora-lite"))]
    assert page == "SECURITY.md" or len(named) > 10
    inside = [path for path in named if path not in ("src/", "tests/")]
    assert not [path for path in inside if not (ROOT / path).exists()]


def test_targets_that_are_called_exist() -> None:
    """The hooks before a commit and the workflows call targets of the Makefile, as people do."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    called = {}
    for path in [ROOT / ".pre-commit-config.yaml", *sorted(ROOT.glob(".github/workflows/*.yml"))]:
        found = re.findall(r"(?:run|entry): make ([a-z-]+)", path.read_text(encoding="utf-8"))
        assert found
        called[path.name] = set(found)
    assert not set.union(*called.values()) - targets
    assert called["tests.yml"] >= {"check", "test"}
    check = re.search(r"^check:.*\n(?:\t.*\n)*", makefile, re.MULTILINE)
    assert check
    assert "workflows" in check[0]
