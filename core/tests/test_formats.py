"""Formats: found by entry point, lazily; recognised on load; every mistake of a plugin by name."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite import format_plugins, plugins
from safetensors.torch import save_file
from torch import nn

Make = Callable[..., nn.Module]
Guard = Callable[[nn.Module], AbstractContextManager[None]]
Install = Callable[..., None]

# A format of one text file: a line for each layer, with a number for its LoRA of rank 1.
LINES = """
import torch
from lora_lite.author import ForeignAdapter, Format, make_variant

class Lines(Format):
    name = "lines"

    def recognises(self, path):
        return path.is_file() and path.suffix == ".lines"

    def write(self, adapter, base, path, *, digits=3):
        state = adapter.state_dict()
        numbers = {p: float(state[f"{p}.B"].mean()) for p in adapter.sites}
        path.write_text("".join(f"{p} {n:.{digits}f}\\n" for p, n in numbers.items()))

    def read(self, path, base):
        numbers = dict(line.split() for line in path.read_text().splitlines())
        sites = base.sites(numbers)
        lora = make_variant("lora", {"r": 1, "alpha": 1.0})
        tensors = {
            p: {
                "A": torch.ones(1, sites[p].d_in),
                "B": torch.full((sites[p].d_out, 1), float(n)),
            }
            for p, n in numbers.items()
        }
        return ForeignAdapter(dict.fromkeys(numbers, lora), tensors, scale=2.0)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution of one module for the duration of a test."""
    registered = {name for name, _ in plugins.manager.list_name_plugin()}
    modules: list[str] = []

    def make(module: str, code: str, points: dict[str, str], requires: str = "") -> None:
        folder = tmp_path / module
        info = folder / f"{module}-1.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\n{needs}"
        )
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[lora_lite.formats]\n{lines}")
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)

    yield make
    for name, _ in plugins.manager.list_name_plugin():
        if name not in registered:
            plugins.manager.unregister(name=name)
    for module in modules:
        sys.modules.pop(module, None)


def test_a_strangers_format(
    install: Install, blocks: Make, tmp_path: Path, untouched: Guard
) -> None:
    """It is used by its name to save, recognised on load, and not imported before."""
    install("stranger_lines", LINES, {"lines": "stranger_lines:Lines"})
    assert "lines" in format_plugins.formats()
    assert "stranger_lines" not in sys.modules
    model = blocks()
    adapter = ll.attach(model, "lora", r=1, alpha=1.0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".B"):
                parameter.fill_(0.25)
    adapter.save(tmp_path / "a.safetensors")
    ll.load(blocks(), tmp_path / "a.safetensors")
    assert "stranger_lines" not in sys.modules
    with untouched(model):
        ll.save(model, tmp_path / "a.lines", format="lines", digits=2)
    assert (tmp_path / "a.lines").read_text().splitlines()[0] == "blocks.0.up 0.25"
    other = nn.ModuleDict({"inner": blocks()})
    loaded = ll.load(other, tmp_path / "a.lines", name="b", rename={"^": "inner."})
    assert (loaded.name, loaded.scale) == ("b", 2.0)
    assert list(loaded.sites) == [f"inner.{path}" for path in adapter.sites]
    x = torch.randn(3, 8)
    change = ll.adapters(other)["b"].low_rank()["inner.blocks.0.up"]
    torch.testing.assert_close(change.B @ change.A, torch.full((12, 8), 0.5).double())
    other["inner"](x)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nowhere 0.5\n", "does not have 1 of them"),
        ("blocks.0.up nan\n", "not finite"),
        ("", "adapts no layer"),
    ],
)
def test_nothing_is_attached_where_reading_fails(
    install: Install, blocks: Make, tmp_path: Path, untouched: Guard, text: str, reason: str
) -> None:
    install("stranger_lines", LINES, {"lines": "stranger_lines:Lines"})
    (tmp_path / "a.lines").write_text(text)
    model = blocks()
    with untouched(model), pytest.raises(ll.AdapterFileError, match=reason):
        ll.load(model, tmp_path / "a.lines")


def test_mistakes_in_saving(install: Install, blocks: Make, tmp_path: Path) -> None:
    """An unknown format, an unknown option, and a path that cannot be written are named."""
    install("stranger_lines", LINES, {"lines": "stranger_lines:Lines"})
    adapter = ll.attach(blocks(), "lora", r=1)
    with pytest.raises(ll.PluginError, match=r"there is no format 'line'.*Did you mean 'lines'"):
        adapter.save(tmp_path / "a", format="line")
    with pytest.raises(ll.AdapterFileError, match=r"does not take 'digit'.*options are digits"):
        adapter.save(tmp_path / "a", format="lines", digit=2)
    with pytest.raises(ll.AdapterFileError, match="cannot be written"):
        adapter.save(tmp_path / "nowhere" / "a", format="lines")
    with pytest.raises(ll.AdapterFileError, match="derived=False"):
        adapter.save(tmp_path / "a", format="lines", derived=False)
    with pytest.raises(ll.AdapterFileError, match="has no options to take"):
        adapter.save(tmp_path / "a", digits=2)


READ_ONLY = LINES.replace("def write", "def _write")
WRITE_ONLY = LINES.replace("def read", "def _read")


def test_a_format_may_only_read_or_only_write(
    install: Install, blocks: Make, tmp_path: Path
) -> None:
    install("stranger_read", READ_ONLY, {"lines": "stranger_read:Lines"})
    with pytest.raises(ll.AdapterError, match="can only be read"):
        ll.attach(blocks(), "lora", r=1).save(tmp_path / "a", format="lines")


def test_what_only_writes_says_so(install: Install, blocks: Make, tmp_path: Path) -> None:
    install("stranger_write", WRITE_ONLY, {"lines": "stranger_write:Lines"})
    (tmp_path / "a.lines").write_text("blocks.0.up 1\n")
    with pytest.raises(ll.AdapterFileError, match="can only be written"):
        ll.load(blocks(), tmp_path / "a.lines")


@pytest.mark.parametrize(
    ("code", "target", "requires", "reason"),
    [
        ("import no_such_module", "Lines", "", "fails on import: ModuleNotFoundError"),
        ("Lines = 3", "Lines", "", "gives 3.*subclass of lora_lite.Format"),
        (LINES.replace('"lines"', '"other"'), "Lines", "", "whose name is 'other'"),
        (LINES, "Lines", "lora-lite-core>=7", "another version of the core"),
    ],
)
def test_a_broken_format_is_named_and_disturbs_no_other(
    install: Install,
    blocks: Make,
    tmp_path: Path,
    code: str,
    target: str,
    requires: str,
    reason: str,
) -> None:
    """Asked for, it is an error; it neither breaks our own files nor formats that are whole."""
    install("stranger_broken", code, {"lines": f"stranger_broken:{target}"}, requires)
    whole = LINES.replace('"lines"', '"rows"').replace(".lines", ".rows")
    install("stranger_rows", whole, {"rows": "stranger_rows:Lines"})
    adapter = ll.attach(blocks(), "lora", r=1)
    with pytest.raises(ll.PluginError, match=f"(?s)'lines' of stranger_broken 1.5.*{reason}"):
        adapter.save(tmp_path / "a.lines", format="lines")
    (tmp_path / "a.lines").write_text("blocks.0.up 1\n")
    with pytest.raises(ll.PluginError, match=reason):
        ll.load(blocks(), tmp_path / "a.lines")
    adapter.save(tmp_path / "a.rows", format="rows")
    ll.load(blocks(), tmp_path / "a.rows")
    adapter.save(tmp_path / "a.safetensors")
    ll.load(blocks(), tmp_path / "a.safetensors")


def test_one_name_twice_and_one_path_for_two(
    install: Install, blocks: Make, tmp_path: Path
) -> None:
    """Neither is decided by chance: both distributions, or both formats, are named."""
    install("stranger_one", LINES, {"lines": "stranger_one:Lines"})
    install("stranger_two", LINES, {"lines": "stranger_two:Lines"})
    adapter = ll.attach(blocks(), "lora", r=1)
    with pytest.raises(ll.PluginError, match=r"provided twice, by (?=.*stranger_one)(?=.*_two)"):
        adapter.save(tmp_path / "a", format="lines")
    third = LINES.replace('"lines"', '"third"')
    fourth = LINES.replace('"lines"', '"fourth"')
    install("stranger_three", third, {"third": "stranger_three:Lines"})
    install("stranger_four", fourth, {"fourth": "stranger_four:Lines"})
    (tmp_path / "a.lines").write_text("blocks.0.up 1\n")
    with pytest.raises(ll.AdapterFileError, match="recognised by the formats 'fourth' and 'third'"):
        ll.load(blocks(), tmp_path / "a.lines")


def test_paths_that_no_format_knows(blocks: Make, tmp_path: Path) -> None:
    """What is there is explained as before; a damaged file of our own is not taken for another."""
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ll.AdapterFileError, match="holds tensors, but no adapter"):
        ll.load(blocks(), tmp_path / "x.safetensors")
    with pytest.raises(ll.AdapterFileError, match="cannot be read"):
        ll.load(blocks(), tmp_path / "nowhere")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ll.AdapterFileError, match=r"GGUF file of llama\.cpp"):
        ll.load(blocks(), tmp_path / "x.gguf")
    ll.attach(blocks(), "lora", r=1).save(tmp_path / "own.safetensors")
    data = bytearray((tmp_path / "own.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "own.safetensors").write_bytes(data)
    with pytest.raises(ll.AdapterFileError, match="is damaged"):
        ll.load(blocks(), tmp_path / "own.safetensors")


def test_importing_lora_lite_imports_no_format() -> None:
    code = "import sys, lora_lite; print('lora_lite_peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
