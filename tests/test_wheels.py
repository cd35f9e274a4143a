"""Every distribution is a wheel that works where only what it declares is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMBERS = [ROOT / "core", *sorted((ROOT / "plugins").glob("*/pyproject.toml")), ROOT / "benchmark"]
FOLDERS = [member.parent if member.is_file() else member for member in MEMBERS]
CONSTRAINTS = ROOT / "constraints.txt"

pytestmark = pytest.mark.slow

TRY = """
import sys
import torch
import lora_lite as ll
from torch import nn

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

def refused(error, variant, **fields):
    try:
        ll.attach(model, variant, **fields)
    except error as raised:
        return raised
    raise SystemExit(f"{variant} {fields} was not refused")

model, x = Tower(), torch.randn(4, 32)
before = model(x)
assert "pip install lora-lite-lora" in str(refused(ll.UnknownVariantError, "lora"))
assert "'antipasto'" in str(refused(ll.UnknownVariantError, "antipato"))
told = refused(ll.FieldError, "antipasto", rotate_bases="V")
assert (told.variant, list(told.fields)) == ("antipasto", ["rotate_bases"]), told
assert "'rotate_basis'" in str(told), told
adapter = ll.attach(model, "antipasto", r=16, rotate_basis="V")
adapter.save("adapter.safetensors", derived=False)
assert torch.equal(model(x), before)
adapter.detach()
ll.load(model, "adapter.safetensors")
assert not {"transformers", "peft", "pytest", "hypothesis"} & set(sys.modules)
print("works")
"""


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(
    folder: Path,
    wheels: Path,
    *requirements: str,
    over: Path | None = None,
    exact: Path = CONSTRAINTS,
) -> Path:
    """The Python of a new environment with these requirements.

    Of a package that it has not, it sees that of the environment `over` which it lies, if any.
    """
    run(sys.executable, "-m", "venv", folder)
    if over:
        (site_packages(folder) / "under.pth").write_text(str(site_packages(over)))
    install = ["-m", "pip", "install", "--quiet", "--constraint", exact, "--find-links", wheels]
    run(folder / "bin" / "python", *install, *requirements)
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for member in FOLDERS:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, member)
    return folder


@pytest.fixture(scope="module")
def python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with lora-lite-core and lora-lite-antipasto, and what they declare."""
    folder = tmp_path_factory.mktemp("environment")
    return environment(folder, wheels, "lora-lite-core", "lora-lite-antipasto")


@pytest.fixture(scope="module")
def testing(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with lora-lite-core[testing], and no plugin."""
    folder = tmp_path_factory.mktemp("testing")
    environment(folder, wheels, "lora-lite-core[testing]")
    return folder


def test_core_and_one_plugin_work_with_only_what_they_declare(python: Path, tmp_path: Path) -> None:
    """A user's first minute: attach, the errors for what is missing or misspelt, save and load."""
    assert run(python, "-c", TRY, cwd=tmp_path).strip() == "works"
    assert run(python.parent / "lora-lite", "variants").split()[0] == "antipasto"


def test_every_plugin_installs_beside_the_core(python: Path, wheels: Path) -> None:
    """Each imports, `variants` lists them all, and nobody's requirements disagree."""
    plugins = [
        wheel
        for wheel in wheels.glob("*.whl")
        if "benchmark" not in wheel.name and "core" not in wheel.name
    ]
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        CONSTRAINTS,
        "--find-links",
        wheels,
        *plugins,
    )
    checked = run(python.parent / "lora-lite", "variants", "--check").splitlines()
    assert {line.split()[1] for line in checked} >= {
        "lora-lite-antipasto",
        "lora-lite-lora",
        "lora-lite-lora-xs",
    }
    run(python, "-m", "pip", "check")


@pytest.mark.parametrize(
    "plugin", [folder.parent.name for folder in sorted((ROOT / "plugins").glob("*/tests"))]
)
def test_a_plugins_tests_pass_with_only_what_it_declares(
    plugin: str, wheels: Path, testing: Path, tmp_path: Path
) -> None:
    """Its tests need the core, itself and its extra `test`, and nothing that happens to be near."""
    python = environment(tmp_path, wheels, f"lora-lite-{plugin}[test]", over=testing)
    told = run(
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        ROOT / "plugins" / plugin / "tests",
        cwd=ROOT,
    )
    assert " skipped" not in told, told


def lowest_versions() -> dict[str, str]:
    """What the core and its extra `testing` declare as the lowest version of each package.

    torch is too large to try.
    """
    found = re.findall(
        r'"([a-z]+)(?:\[\w+\])?>=([\d.]+)"', (ROOT / "core/pyproject.toml").read_text()
    )
    return {name: version for name, version in found if name not in ("torch", "hatchling")}


def test_the_lowest_declared_versions_work(wheels: Path, testing: Path, tmp_path: Path) -> None:
    """Two plugins keep every promise with the oldest packages that the core says it takes.

    Errors read as they should.
    """
    lowest = lowest_versions()
    ours = {"safetensors", "pydantic", "pluggy", "packaging"}
    assert lowest.keys() == ours | {"pytest", "hypothesis"}
    exact = tmp_path / "lowest.txt"
    torch = next(
        line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")
    )
    exact.write_text(
        "\n".join([torch, *(f"{name}=={version}" for name, version in lowest.items())])
    )
    plugins = ["lora-lite-lora", "lora-lite-antipasto"]
    python = environment(
        tmp_path / "environment", wheels, *lowest, *plugins, over=testing, exact=exact
    )
    versions = (
        "from importlib.metadata import version; import sys; print(*map(version, sys.argv[1:]))"
    )
    for (name, version), installed in zip(
        lowest.items(), run(python, "-c", versions, *lowest).split(), strict=True
    ):
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", installed), name
    tests = [
        ROOT / "plugins" / name / "tests/test_conformance.py" for name in ("lora", "antipasto")
    ]
    run(python, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=ROOT)
    no_plugin = TRY.replace(
        'assert "pip install lora-lite-lora" in str(refused(ll.UnknownVariantError, "lora"))\n', ""
    )
    assert run(python, "-c", no_plugin, cwd=tmp_path).strip() == "works"


def test_wheels_hold_what_they_need_and_nothing_else(wheels: Path) -> None:
    """Types, licence, the install hints and the embedded models are in; tests are not."""
    built = list(wheels.glob("*.whl"))
    assert len(built) == len(FOLDERS)
    for wheel in built:
        names = zipfile.ZipFile(wheel).namelist()
        assert any(name.endswith("py.typed") for name in names), wheel.name
        assert any(name.endswith("LICENSE") for name in names), wheel.name
        assert not [name for name in names if "/tests/" in name and not name.endswith(".tmpl")], (
            wheel.name
        )
    core = next(wheel for wheel in built if "core" in wheel.name)
    assert "lora_lite/first_party.json" in zipfile.ZipFile(core).namelist()
    template = {name for name in zipfile.ZipFile(core).namelist() if "/template/" in name}
    assert {Path(name).name for name in template} >= {
        "pyproject.toml.tmpl",
        "ci.yml.tmpl",
        ".gitignore.tmpl",
        "LICENSE.tmpl",
    }
    benchmark = next(wheel for wheel in built if "benchmark" in wheel.name)
    for task in ("tiny", "skill"):
        model = [
            item
            for item in zipfile.ZipFile(benchmark).infolist()
            if f"/{task}/model/" in item.filename
        ]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            Path(item.filename).name for item in model
        }
        assert sum(item.file_size for item in model) <= 6_000_000
