"""`lora-lite new`: the package it writes is installed as it stands, keeps every promise, and
attaches by its name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_lite.cli import main
from lora_lite.testing import PROMISES

ROOT = Path(__file__).parents[1]

LAST_LINE = """
import torch, lora_lite as ll
model = torch.nn.ModuleList([torch.nn.Linear(8, 6)])
adapter = ll.attach(model, "my_method")
print(adapter.variant, adapter.num_parameters, ll.variants()["my_method"].distribution)
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Runs `lora-lite new NAME` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> Path:
        assert main(["new", name]) == 0
        return next(tmp_path.glob("lora-lite-*"))

    return run


def python(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    """This interpreter, with an installed folder on its path."""
    before = os.environ.get("PYTHONPATH", "")
    extra = {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), before]))} if path else {}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **extra}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def install_and_test(package: Path) -> Path:
    """Installs a package into a folder beside it, and runs its tests there, which must pass without
    a warning.
    """
    installed = package.parent / "installed"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", installed]
    python("-m", "pip", "install", *options, package, cwd=package)
    tests = python(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", cwd=package, path=installed
    )
    assert re.search(rf"^=+ {len(PROMISES) + 1} passed in .+ =+$", tests, re.MULTILINE), tests
    return installed


def test_the_package_installs_keeps_every_promise_and_attaches_by_name(
    write: Write, tmp_path: Path
) -> None:
    """A new method's first minutes: write the package, install it, run its tests, attach it."""
    installed = install_and_test(write("my-method"))
    told = python("-c", LAST_LINE, cwd=tmp_path, path=installed)
    assert told.split() == ["my_method(r=4,", "s=2.0)", "56", "lora-lite-my-method"]


def test_the_tutorial_leads_to_a_package_that_keeps_every_promise(write: Write) -> None:
    """The two files that the page on writing a variant gives, put where it says, are all that VeRA
    needs.
    """
    page = (ROOT / "docs/writing-a-variant.md").read_text()
    method, _, tests, *_ = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    package = write("my-vera")
    (package / "src/lora_lite_my_vera/my_vera.py").write_text(method)
    (package / "tests/test_my_vera.py").write_text(tests)
    install_and_test(package)


def test_the_package_is_formatted_linted_and_typed(write: Write) -> None:
    """What is written passes the project's own linter, formatter and strict type checker."""
    package = write("my-method")
    python("-m", "ruff", "check", "--isolated", ".", cwd=package)
    python(
        "-m", "ruff", "format", "--isolated", "--line-length", "100", "--check", ".", cwd=package
    )
    settings = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    python("-m", "mypy", *settings, "src", cwd=package)


@pytest.mark.parametrize("name", ["low-rank", "low_rank"])
def test_names_are_exchanged(write: Write, name: str) -> None:
    """One name, three spellings: of the distribution, of the variant and of the class; nothing of
    the template's is left.
    """
    package = write(name)
    assert package.name == "lora-lite-low-rank"
    files = {
        str(file.relative_to(package)): file.read_text()
        for file in package.rglob("*")
        if file.is_file()
    }
    assert not [
        path
        for path, text in files.items()
        if "method" in path or "my" in text.split() or "my_method" in text
    ]
    assert 'class LowRank(Variant, name="low_rank")' in files["src/lora_lite_low_rank/low_rank.py"]
    assert 'low_rank = "lora_lite_low_rank:LowRank"' in files["pyproject.toml"]
    expected = {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        ".github/workflows/ci.yml",
        "tests/test_low_rank.py",
        ".gitignore",
    }
    assert expected < files.keys()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("My-Method", "expected lower-case words"),
        ("2bit", "expected lower-case words"),
        ("a--b", "expected lower-case words"),
        ("../up", "expected lower-case words"),
        ("", "expected lower-case words"),
        ("class", "expected lower-case words"),
        ("lora-lite-mine", "without lora-lite before them"),
        ("antipasto", "'antipasto' is taken"),
        ("lora-xs", "'lora_xs' is taken"),
        ("core", "'core' is taken"),
    ],
)
def test_names_that_cannot_be(
    name: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No folder is begun for a name that is no name, or is taken."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 1
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call does not write over somebody's work."""
    package = write("my-method")
    (package / "README.md").write_text("my work")
    assert main(["new", "my_method"]) == 1
    assert "lora-lite-my-method is there already" in capsys.readouterr().err
    assert (package / "README.md").read_text() == "my work"


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing fails in the middle, nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    write_text, written = Path.write_text, []

    def full_disk(self: Path, *arguments: str) -> int:
        written.append(self)
        if len(written) == 4:
            raise OSError("no space left on device")
        return write_text(self, *arguments)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        main(["new", "my-method"])
    assert len(written) == 4
    assert not list(tmp_path.iterdir())
