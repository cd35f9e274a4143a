"""Every distribution is a wheel that works where only what it declares is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMBERS = [ROOT / "core", *sorted((ROOT / "plugins").glob("*/pyproject.toml")), ROOT / "benchmark"]
FOLDERS = [member.parent if member.is_file() else member for member in MEMBERS]

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

def refused(error, **call):
    try:
        ll.attach(model, call.pop("variant"), **call)
    except error as e:
        return str(e)
    raise SystemExit(f"{call} was not refused")

model, x = Tower(), torch.randn(4, 32)
before = model(x)
assert "pip install lora-lite-lora" in refused(ll.UnknownVariantError, variant="lora")
assert "'antipasto'" in refused(ll.UnknownVariantError, variant="antipato")
told = refused(ll.FieldError, variant="antipasto", rotate_bases="V")
assert "'antipasto'" in told and "'rotate_bases'" in told and "'rotate_basis'" in told, told
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


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for member in FOLDERS:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, member)
    return folder


@pytest.fixture(scope="module")
def python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with lora-lite-core and lora-lite-antipasto, and what they declare."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "--find-links", wheels]
    run(*install, "lora-lite-core", "lora-lite-antipasto")
    return python


def test_core_and_one_plugin_work_with_only_what_they_declare(python: Path, tmp_path: Path) -> None:
    """The practitioner's first minute: attach, the errors for what is missing or misspelt, save and load."""
    assert run(python, "-c", TRY, cwd=tmp_path).strip() == "works"
    assert run(python.parent / "lora-lite", "variants").split()[0] == "antipasto"


def test_every_plugin_installs_beside_the_core(python: Path, wheels: Path, tmp_path: Path) -> None:
    """A plugin needs the core and nothing else: each imports, and `variants` lists them all."""
    plugins = [wheel for wheel in wheels.glob("*.whl") if "benchmark" not in wheel.name and "core" not in wheel.name]
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *plugins)
    listed = run(python.parent / "lora-lite", "variants").splitlines()
    load = "import sys; from lora_lite.plugins import variant_class; print(variant_class(sys.argv[1]).name)"
    for name in (line.split()[0] for line in listed):
        assert run(python, "-c", load, name, cwd=tmp_path).strip() == name
    assert len(listed) >= len(plugins)
    run(python, "-m", "pip", "check")


def test_wheels_hold_what_they_need_and_nothing_else(wheels: Path) -> None:
    """Types, licence, and the embedded model are in; tests are not."""
    built = list(wheels.glob("*.whl"))
    assert len(built) == len(FOLDERS)
    for wheel in built:
        names = zipfile.ZipFile(wheel).namelist()
        assert any(name.endswith("py.typed") for name in names), wheel.name
        assert any(name.endswith("LICENSE") for name in names), wheel.name
        assert not [name for name in names if "/tests/" in name], wheel.name
    benchmark = next(wheel for wheel in built if "benchmark" in wheel.name)
    model = [item for item in zipfile.ZipFile(benchmark).infolist() if "/tiny/model/" in item.filename]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {Path(item.filename).name for item in model}
    assert sum(item.file_size for item in model) <= 6_000_000
