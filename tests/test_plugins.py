"""Discovery through real entry points: laziness, and what is said when a plugin cannot be used.

The others go on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import fileformat, plugins
from lora_lite.author import top_r_svd
from torch import nn

Install = Callable[..., None]
Refused = Callable[..., AbstractContextManager[Any]]

ROOT = Path(__file__).parents[1]

GOOD = """
import torch, lora_lite.author as ll

class Shift(ll.Variant, name="shift"):
    size: float = 0.5
    def tensors(self, site): return {"b": ll.TensorSpec((site.d_out,))}
    def init(self, site, derived, statistics, rng): return {"b": torch.zeros(site.d_out)}
    def delta_output(self, site, t, x, y): return (self.size * t["b"]).expand_as(y)
"""

KIND = """
import torch, lora_lite.author as ll

class Turned(torch.nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.matrix = torch.nn.Parameter(torch.randn(d_in, d_out))
    def forward(self, x): return x @ self.matrix

class TurnedKind(ll.LayerKind):
    def matches(self, module): return type(module) is Turned
    def shape(self, module): return module.in_features, module.out_features
    def weight(self, module): return module.matrix.T
    def enter(self, module): module.entered = getattr(module, "entered", 0) + 1
    def exit(self, module): module.entered -= 1
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution of one module for the duration of a test.

    Its metadata and its code lie on a path of their own.
    """
    registered = {name for name, _ in plugins.manager.list_name_plugin()}
    modules = set(sys.modules)

    def make(
        distribution: str,
        module: str,
        code: str,
        entry_points: dict[str, dict[str, str]],
        requires: str = "",
    ) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n{needs}"
        )
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
            for group, points in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("".join(lines))
        monkeypatch.syspath_prepend(str(folder))
        plugins._layer_entry_points.cache_clear()

    yield make
    for name, _ in plugins.manager.list_name_plugin():
        if name not in registered:
            plugins.manager.unregister(name=name)
    for name in set(sys.modules) - modules:
        if name.startswith("stranger"):
            del sys.modules[name]
    plugins._layer_entry_points.cache_clear()


def variants(**points: str) -> dict[str, dict[str, str]]:
    """Entry points of the group for variants."""
    return {"lora_lite.variants": points}


def model() -> nn.Module:
    """A model of one block."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])


def the_others_work() -> None:
    """LoRA attaches, and installed variants are listed."""
    assert ll.attach(model(), "lora", r=2).num_parameters == 16
    assert {"lora", "antipasto"} <= ll.variants().keys()


def test_variants_lists_what_is_installed_without_importing_it(install: Install) -> None:
    """Name, distribution, version and target come from metadata.

    A plugin that cannot even be imported is listed too.
    """
    install("lora-lite-stranger", "stranger", "raise SystemError", variants(shift="stranger:Shift"))
    found = ll.variants()
    assert found["shift"] == ll.VariantInfo("shift", "lora-lite-stranger", "1.5", "stranger:Shift")
    assert found["lora"].distribution == "lora-lite-lora"
    assert "stranger" not in sys.modules


def test_a_strangers_plugin(install: Install, refused: Refused, tmp_path: Path) -> None:
    """An installed stranger is attached and loaded by name as ours; its file says who wrote it."""
    install("lora-lite-stranger", "stranger", GOOD, variants(shift="stranger:Shift"))
    adapter = ll.attach(model(), "shift", size=2.0)
    assert (str(adapter.variant), adapter.num_parameters) == ("shift(size=2.0)", 4)
    adapter.save(tmp_path / "a")
    (configuration,) = fileformat.read(tmp_path / "a")[0].configurations
    assert configuration.provider == "lora-lite-stranger 1.5"
    assert ll.load(model(), tmp_path / "a").variant == adapter.variant
    with refused(None, ll.UnknownVariantError, ("Did you mean 'shift'",), plugin="shfit"):
        ll.attach(model(), "shfit")


def test_broken_on_import(install: Install, refused: Refused) -> None:
    """Distribution, version, the cause (chained) and the core it asks for are named.

    It is never called "not installed".
    """
    install(
        "lora-lite-stranger",
        "stranger",
        "import no_such_module_anywhere",
        variants(shift="stranger:Shift"),
        requires="lora-lite-core<9,>=0.1",
    )
    fields = {"plugin": "shift", "distributions": ("lora-lite-stranger",)}
    core = f"lora-lite-core {version('lora-lite-core')}"
    says = ("lora-lite-stranger 1.5", "'no_such_module_anywhere'", "lora-lite-core<9,>=0.1", core)
    with refused(None, ll.PluginError, says, **fields) as caught:
        ll.attach(model(), "shift")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "not installed" not in str(caught.value)
    assert "pip install" not in str(caught.value)
    the_others_work()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("stranger:Nothing", ("AttributeError", "'Nothing'")),
        ("stranger:__name__", ("'stranger'", "Variant")),
        ("stranger:torch.nn.Linear", ("linear.Linear", "Variant")),
        ("stranger:Shift", ("'moved'", "Shift", "'shift'")),
    ],
)
def test_wrong_object(
    install: Install, refused: Refused, target: str, says: tuple[str, ...]
) -> None:
    """An entry point without object, with another one, or with a class of another name.

    Its author's mistake is named.
    """
    install("lora-lite-stranger", "stranger", GOOD, variants(moved=target))
    fields = {"plugin": "moved", "distributions": ("lora-lite-stranger",)}
    with refused(None, ll.PluginError, says, **fields):
        ll.attach(model(), "moved")
    the_others_work()


def test_provided_twice(install: Install) -> None:
    """A name that two distributions claim is refused with both named, not decided by chance.

    variants() lists both.
    """
    install("lora-lite-stranger", "stranger", GOOD, variants(shift="stranger:Shift"))
    install("lora-lite-stranger-two", "stranger_two", GOOD, variants(shift="stranger_two:Shift"))
    both = {"lora-lite-stranger", "lora-lite-stranger-two"}
    with pytest.raises(ll.PluginError) as caught:
        ll.attach(model(), "shift")
    assert (caught.value.plugin, set(caught.value.distributions)) == ("shift", both)
    assert all(f"{distribution} 1.5" in str(caught.value) for distribution in both)
    assert set(ll.variants()["shift"].distribution.split(" / ")) == both
    the_others_work()


def test_not_installed_gives_the_exact_command(
    monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """For a variant of ours that is missing, the error is the pip command that installs it."""
    found = plugins.entry_points_of
    monkeypatch.setattr(
        plugins,
        "entry_points_of",
        lambda group: {k: v for k, v in found(group).items() if k != "ia3_ff"},
    )
    monkeypatch.setattr(plugins.manager.hook, "lora_lite_variant", lambda **_: None)
    fields = {"plugin": "ia3_ff", "distributions": ("lora-lite-ia3",)}
    with refused(None, ll.UnknownVariantError, **fields) as caught:
        ll.attach(model(), "ia3_ff")
    assert str(caught.value).endswith(": pip install lora-lite-ia3")


def test_layer_kind_of_a_stranger(install: Install) -> None:
    """A kind from the entry point named after the layers' package is loaded for such a layer alone.

    enter and exit are called once, with the first and the last adapter.
    """
    install(
        "lora-lite-stranger",
        "stranger",
        KIND,
        {"lora_lite.layers": {"stranger": "stranger:TurnedKind"}},
    )
    ll.plan(model(), "lora", r=2)
    assert "stranger" not in sys.modules
    import stranger  # type: ignore[import-not-found]

    odd = nn.ModuleList([nn.ModuleDict({"turned": stranger.Turned(6, 4)})])
    layer, x = odd[0]["turned"], torch.randn(3, 6)
    base = layer(x)
    one, two = (ll.attach(odd, "lora", r=2, name=name) for name in ("one", "two"))
    for p in one.parameters():
        nn.init.ones_(p)
    torch.testing.assert_close(layer(x) - base, 16 * x.sum(-1, keepdim=True).expand(3, 4))
    assert layer.entered == 1
    one.detach()
    assert layer.entered == 1
    two.detach()
    assert layer.entered == 0
    rotated = ll.attach(odd, "antipasto", r=4)
    u, s, _ = top_r_svd(layer.matrix.detach().T, 4)
    torch.testing.assert_close(rotated.state_dict()["0.turned.S"], s)
    torch.testing.assert_close(rotated.state_dict()["0.turned.U"], u)


def test_a_layer_that_joins_later_is_entered_with_the_next_adapter(install: Install) -> None:
    """No layer of an adapted model is left in the state from which its kind's `enter` keeps it."""
    install(
        "lora-lite-stranger",
        "stranger",
        KIND,
        {"lora_lite.layers": {"stranger": "stranger:TurnedKind"}},
    )
    import stranger

    odd = nn.ModuleList([stranger.Turned(6, 4)])
    ll.attach(odd, "lora", r=2)
    odd.append(stranger.Turned(4, 4))
    ll.attach(odd, "lora", r=2, name="other", targets="0")
    assert [layer.entered for layer in odd] == [1, 1]
    for adapter in ll.adapters(odd).values():
        adapter.detach()
    assert [layer.entered for layer in odd] == [0, 0]


def test_an_enter_that_raises(
    install: Install, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    """A kind that fails on entering its second layer leaves the model as it was.

    The first is exited again, and the second too, since it may have been entered in part.
    """
    code = KIND.replace(
        'module.entered = getattr(module, "entered", 0) + 1', "1 / (module.in_features - 5)"
    )
    code = code.replace("module.entered -= 1", "left.append(module.in_features)") + "\nleft = []"
    install(
        "lora-lite-stranger",
        "stranger",
        code,
        {"lora_lite.layers": {"stranger": "stranger:TurnedKind"}},
    )
    import stranger

    odd = nn.ModuleList([stranger.Turned(6, 4), stranger.Turned(5, 4)])
    with untouched(odd), pytest.raises(ZeroDivisionError):
        ll.attach(odd, "lora", r=2)
    assert stranger.left == [6, 5]


@pytest.mark.parametrize(
    ("code", "says"), [("raise RuntimeError('driver')", "driver"), (GOOD, "LayerKind")]
)
def test_broken_layer_kind(install: Install, refused: Refused, code: str, says: str) -> None:
    """A broken kind is named when a model holds its layers; other models do not notice."""
    package = type("Odd", (nn.Linear,), {"__module__": "stranger_layers.linear"})
    install(
        "lora-lite-stranger",
        "stranger",
        code,
        {"lora_lite.layers": {"stranger_layers": "stranger:Shift"}},
    )
    fields = {"plugin": "stranger_layers", "distributions": ("lora-lite-stranger",)}
    odd = nn.ModuleList([package(4, 4)])
    with refused(
        odd, ll.PluginError, ("lora_lite.layers", "lora-lite-stranger 1.5", says), **fields
    ):
        ll.attach(odd, "lora", r=2)
    the_others_work()


# --- plugins that misbehave, built and installed by pip


GOOD_NAMED = GOOD.replace('"shift"', '"NAME"')

# distribution -> (entry point's name, its object, the module's code, the core it asks for)
STRANGERS: dict[str, tuple[str, str, str, str]] = {
    "stranger-good": ("good", "Shift", GOOD_NAMED, ">=0.1"),
    "stranger-broken": ("broken", "Shift", "import no_such_module_anywhere", ">=0.1"),
    "stranger-exits": ("exits", "Shift", "import sys; sys.exit('no licence key')", ">=0.1"),
    "stranger-one": ("twice", "Shift", GOOD_NAMED, ">=0.1"),
    "stranger-two": ("twice", "Shift", GOOD_NAMED, ">=0.1"),
    "stranger-future": ("future", "Shift", GOOD_NAMED, ">=7,<8"),
    "stranger-past": ("past", "Shift", GOOD_NAMED, "<0.1"),
    "stranger-missing": ("missing", "Shfit", GOOD_NAMED, ">=0.1"),
    "stranger-function": ("function", "make", "def make(): return 1", ">=0.1"),
    "stranger-module": ("module", "", GOOD_NAMED, ">=0.1"),
    "stranger-instance": ("instance", "shift", GOOD_NAMED + "\nshift = Shift()", ">=0.1"),
    "stranger-renamed": ("renamed", "Shift", GOOD, ">=0.1"),
    "stranger-field": (
        "field",
        "Shift",
        GOOD_NAMED.replace("size: float", "penalty: float"),
        ">=0.1",
    ),
    "stranger-word": ("word", "Shift", GOOD_NAMED.replace("size: float", "layers: float"), ">=0.1"),
    "stranger-generic": (
        "generic",
        "Shift",
        "import typing\nT = typing.TypeVar('T')\n"
        + GOOD_NAMED.replace("(ll.Variant,", "(ll.Variant, typing.Generic[T],"),
        ">=0.1",
    ),
}

# the name that is asked for -> what the message must say
REASONS: dict[str, tuple[str, ...]] = {
    "broken": ("ModuleNotFoundError", "'no_such_module_anywhere'"),
    "exits": ("SystemExit: no licence key",),
    "twice": ("stranger-one 1.5", "stranger-two 1.5", "Uninstall one"),
    "future": ("lora-lite-core<8,>=7", f"lora-lite-core {version('lora-lite-core')}"),
    "past": ("lora-lite-core<0.1", f"lora-lite-core {version('lora-lite-core')}"),
    "missing": ("AttributeError", "'Shfit'"),
    "function": ("<function make at", "Variant"),
    "module": ("<module 'stranger_module'", "Variant"),
    "instance": ("Shift(size=0.5)", "Variant"),
    "renamed": ("Shift", "'shift'"),
    "field": ("VariantDefinitionError", "Shift", "'penalty'", "Variant.penalty"),
    "word": ("VariantDefinitionError", "Shift", "'layers'", "attach()"),
    "generic": ("VariantDefinitionError", "Shift", "generic"),
}

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{distribution}"
version = "1.5"
dependencies = ["lora-lite-core{core}"]
[project.entry-points."lora_lite.variants"]
{name} = "{target}"
[tool.hatch.build.targets.wheel]
include = ["*.py"]
"""

ATTACH_EACH = """
import json, sys, torch, lora_lite as ll
def told(name):
    try:
        ll.attach(torch.nn.ModuleList([torch.nn.Linear(8, 8)]), name)
    except ll.PluginError as error:
        return [error.plugin, sorted(error.distributions), str(error)]
before = ll.variants().keys() >= {*sys.argv[1:], "lora"}
errors = {name: told(name) for name in (*sys.argv[1:], "good", "lora")}
print(json.dumps({"listed": before, **errors}))
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a process that finds these distributions.

    Each was built and installed by pip.
    """
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for distribution, (name, attribute, code, core) in STRANGERS.items():
        module = distribution.replace("-", "_")
        entry = f"{module}:{attribute}" if attribute else module
        (source / distribution).mkdir()
        (source / distribution / f"{module}.py").write_text(code.replace("NAME", name))
        project = PYPROJECT.format(distribution=distribution, core=core, name=name, target=entry)
        (source / distribution / "pyproject.toml").write_text(project)
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    folders = [str(source / distribution) for distribution in STRANGERS]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *folders],
        check=True,
        capture_output=True,
    )
    return {**os.environ, "PYTHONPATH": str(target)}


def providers(name: str) -> list[str]:
    """The distributions above that provide a variant."""
    return sorted(each for each, (provided, *_) in STRANGERS.items() if provided == name)


def test_each_mistake_has_its_own_error_and_the_others_work(strangers: dict[str, str]) -> None:
    """attach names the distribution and the mistake of what was asked for.

    In the same process, the others attach.
    """
    command = [sys.executable, "-c", ATTACH_EACH, *REASONS]
    done = subprocess.run(command, env=strangers, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told.pop("listed") is True
    assert (told.pop("good"), told.pop("lora")) == (None, None)
    for name, reasons in REASONS.items():
        plugin, distributions, text = told[name]
        assert (plugin, distributions) == (name, providers(name))
        for reason in (f"{name!r}", *(f"{each} 1.5" for each in distributions), *reasons):
            assert reason in text, f"{reason!r} is not in: {text}"


def test_variants_check_shows_each_with_its_reason(strangers: dict[str, str]) -> None:
    """`lora-lite variants --check` goes on after a broken one, and is status 1.

    Without --check nothing is imported.
    """
    command = [Path(sys.executable).parent / "lora-lite", "variants"]
    listed = subprocess.run(
        command, env=strangers, capture_output=True, text=True, check=True
    ).stdout
    assert "cannot be used" not in listed
    checked = subprocess.run(
        [*command, "--check"], env=strangers, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 1
    names = [name for name, *_ in map(str.split, listed.splitlines())]
    told = dict(re.findall(r"^(\w+) .*\n  cannot be used: (.*)$", checked.stdout, re.MULTILINE))
    assert told.keys() == REASONS.keys()
    for name, reasons in REASONS.items():
        for reason in reasons:
            assert reason in told[name], f"{reason!r} is not in: {told[name]}"
    assert [
        line.split()[0] for line in checked.stdout.splitlines() if not line.startswith("  ")
    ] == names
    for text in ("lora-lite: ", f"{len(REASONS)} of {len(names)} variants", "broken, exits"):
        assert text in checked.stderr


# --- what an import pulls in, each in a process of its own


def loaded_by(code: str) -> list[str]:
    """The root packages in sys.modules after `code`, beyond those that torch alone brings."""
    script = f"import json, sys, torch\nbefore = set(sys.modules)\n{code}\n"
    script += "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


HEAVY = {
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "hypothesis",
    "pytest",
    "bitsandbytes",
}


def unwanted(packages: list[str]) -> set[str]:
    """Of these packages, what `import lora_lite` must not bring: other libraries, any plugin."""
    return {p for p in packages if p in HEAVY or p.startswith("lora_lite_")}


def test_import_is_light() -> None:
    """`import lora_lite` brings pydantic, pluggy, safetensors and packaging beyond torch.

    It brings no transformers and no plugin.
    """
    found = loaded_by("import lora_lite")
    assert {"lora_lite", "pydantic", "pluggy", "safetensors"} <= set(found)
    assert not unwanted(found), unwanted(found)


def test_the_test_above_can_fail() -> None:
    """The same look finds what is really imported."""
    assert unwanted(loaded_by("import lora_lite, lora_lite_lora, peft")) >= {
        "lora_lite_lora",
        "peft",
        "transformers",
    }


def test_a_name_imports_its_own_plugin_only() -> None:
    """attach("antipasto") imports that plugin and no other; variants() none at all."""
    attach = "import lora_lite as ll; blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)]); "
    attach += "ll.plan(blocks, 'antipasto', r=4)"
    assert unwanted(loaded_by(attach)) == {"lora_lite_antipasto"}
    assert not unwanted(loaded_by("import lora_lite as ll; assert 'lora' in ll.variants()"))
