"""The errors: their tree, one whole message of each class, and that they survive pickling.

Other tests ask for classes and fields. Here, and nowhere else, whole messages stand, one for each
class, so that a change of the template is seen as a reader would see it.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import author, errors
from lora_lite.author import Observer, Rng, Site, Tensors, TensorSpec, Variant
from torch import Tensor, nn

Make = Callable[..., nn.Module]


class Low(Variant, name="low"):
    """A rank-r update; with `observed` it asks for calibration data."""

    r: int = 2
    observed: bool = False

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        author.check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"A": torch.ones(self.r, site.d_in), "B": torch.zeros(site.d_out, self.r)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return x @ t["A"].T @ t["B"].T

    def observe(self, site: Site) -> Observer | None:
        return Counter() if self.observed else None


class Counter:
    """Counts nothing."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in nothing."""

    def result(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class FromBase(Low, name="from_base"):
    """Starts from the base's weights."""

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"A": site.weight()[: self.r], "B": torch.zeros(site.d_out, self.r)}


class Flat(Low, name="flat"):
    """Gives a tensor of another shape than it declares."""

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"A": torch.ones(self.r), "B": torch.zeros(site.d_out, self.r)}


class Odd(nn.Linear):
    """Computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).round()


# --- how each class comes to be raised


def _field(blocks: Make) -> None:
    ll.attach(blocks(), "lora", rnak=4)


def _target(blocks: Make) -> None:
    ll.attach(blocks(), Low(), targets="upp$")


def _misfit(blocks: Make) -> None:
    ll.attach(blocks(), Low(r=9), targets="up$")


def _layer_kind(_: Make) -> None:
    ll.attach(nn.ModuleList([Odd(4, 4)]), Low())


def _plugin(blocks: Make) -> None:
    _install("stranger", "1.5", "[lora_lite.variants]\nbroken = no_such_module:Shift\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("stranger")
        ll.attach(blocks(), "broken")


def _unknown_variant(blocks: Make) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["."])  # nothing is installed
        ll.attach(blocks(), "antipato")


def _install(distribution: str, version: str, entry_points: str) -> None:
    """Write the metadata of a distribution into a folder of its name."""
    info = Path(distribution) / f"{distribution}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        "Requires-Dist: lora-lite-core<9,>=0.1\n"
    )
    (info / "entry_points.txt").write_text(entry_points)


def _calibration(blocks: Make) -> None:
    ll.attach(blocks(), Low(observed=True), calibration=[torch.zeros(2, 8), {"y": torch.zeros(3)}])


def _adapter(blocks: Make) -> None:
    ll.attach(model := blocks(), Low(), name="style")
    ll.attach(model, Low(), name="style")


def _check(blocks: Make) -> None:
    model = blocks()
    ll.attach(model, Low(), targets="down$")
    model.blocks[1].forward = lambda x: x  # type: ignore[union-attr, index]
    ll.check(model, torch.ones(3, 8))


def _file(blocks: Make) -> None:
    ll.attach(blocks(), Low()).save("adapter.safetensors")
    ll.load(blocks(depth=1), "adapter.safetensors", variant=Low)


def _base_mismatch(blocks: Make) -> None:
    ll.attach(blocks(), FromBase()).save("adapter.safetensors")
    other = blocks()
    torch.nn.init.ones_(other.blocks[0].up.weight)  # type: ignore[union-attr, index, arg-type]
    ll.load(other, "adapter.safetensors", variant=FromBase)


def _definition(_: Make) -> None:
    namespace = {"__module__": __name__, "delta_outputs": lambda _: None}
    type(Variant)("Misspelt", (Low,), namespace, name="misspelt")


def _contract(blocks: Make) -> None:
    ll.attach(blocks(), Flat())


def _site(blocks: Make) -> None:
    (placement, *_) = ll.plan(blocks(), Low()).placements
    Low(r=9).tensors(placement.site)


# the class, how it comes to be raised, its own fields, and the whole message
GOLDEN: list[tuple[type[ll.LoraLiteError], Callable[[Make], None], Mapping[str, Any], str]] = [
    (
        ll.FieldError,
        _field,
        {"variant": "lora", "fields": ["rnak"]},
        "variant 'lora': there is no field 'rnak'. Its fields are r, alpha, rslora, dropout",
    ),
    (
        ll.TargetError,
        _target,
        {"argument": "targets", "layers": ()},
        """\
targets='upp$' matches none of these layers:
  stem x 1
  up x 2
  down x 2
  lm_head x 1
Every pattern must match at least one layer. Did you mean 'up'?""",
    ),
    (
        ll.MisfitError,
        _misfit,
        {"argument": "targets", "layers": ("blocks.0.up", "blocks.1.up")},
        """\
the variant does not fit 2 of 2 layers:
  blocks.0.up (8 -> 12): low: r: 9 is larger than this layer allows; the largest possible is 8
  blocks.1.up (8 -> 12): low: r: 9 is larger than this layer allows; the largest possible is 8
The model was not changed. Choose other hyperparameters, for all layers or for these \
(overrides=), or leave these layers out (exclude=)""",
    ),
    (
        author.LayerKindError,
        _layer_kind,
        {"argument": "targets", "layers": ("0",)},
        f"""\
these layers look linear, but no installed layer kind can read them:
  0: {__name__}.Odd, its weight torch.nn.parameter.Parameter
Install the plugin for their kind; or write one (a lora_lite.author.LayerKind in the \
entry-point group lora_lite.layers, named after their root package); or leave them out with \
exclude=""",
    ),
    (
        ll.PluginError,
        _plugin,
        {"plugin": "broken", "distributions": ("stranger",)},
        (
            "lora_lite.variants 'broken' of stranger 1.5 (no_such_module:Shift) is installed but "
            "fails on import: ModuleNotFoundError: No module named 'no_such_module'. It asks for "
            f"lora-lite-core<9,>=0.1, and lora-lite-core {version('lora-lite-core')} is installed. "
            "If it needs a package that is missing, install that; else tell its author"
        ),
    ),
    (
        ll.UnknownVariantError,
        _unknown_variant,
        {"plugin": "antipato", "distributions": ()},
        (
            "there is no variant 'antipato'. No variant is installed. Did you mean 'antipasto' or "
            "'antipasto_mix' or 'antipasto_gain'?"
        ),
    ),
    (
        ll.CalibrationError,
        _calibration,
        {"batch": 1, "layers": ()},
        (
            "the model rejects calibration batch 1 (y: float32[3]): TypeError: Blocks.forward() "
            "got an unexpected keyword argument 'y'. A mapping gives keywords, a tuple "
            "or list positions"
        ),
    ),
    (
        ll.AdapterError,
        _adapter,
        {"adapter": "style", "layer": ""},
        (
            "an adapter named 'style' is attached already. In use: style. Detach it, or give "
            "another name="
        ),
    ),
    (
        ll.CheckError,
        _check,
        {"adapter": "", "layer": "blocks.1.down"},
        """\
3 things are wrong:
  blocks.1.down: the layer was never called, so its hooks never ran
  default: blocks.1.down.A: no gradient
  default: blocks.1.down.B: no gradient
Layers that the model never calls can be left out with exclude=""",
    ),
    (
        ll.AdapterFileError,
        _file,
        {"path": "adapter.safetensors", "tensors": ()},
        """\
adapter.safetensors adapts 4 layers, and Blocks does not have 2 of them; nothing was changed:
  blocks.1.up. Did you mean 'blocks.0.up'?
  blocks.1.down. Did you mean 'blocks.0.down'?
Load the model that the adapter was made for""",
    ),
    (
        ll.BaseMismatchError,
        _base_mismatch,
        {"path": "adapter.safetensors", "tensors": ()},
        """\
adapter.safetensors was made on a base with other weights: 1 of 4 layers differ by more than \
rounding to bfloat16:
  blocks.0.up
Its tensors were computed from the weights of its own base. Load that base, or give \
check_base=False""",
    ),
    (
        author.VariantDefinitionError,
        _definition,
        {"class_name": "Misspelt"},
        (
            "Misspelt: the method 'delta_outputs' is not part of the contract. Its name is "
            "nearly 'delta_output', so it is probably misspelt. Rename it; a helper of your own "
            "could be called _delta_outputs"
        ),
    ),
    (
        author.VariantContractError,
        _contract,
        {"variant": "flat", "layer": "blocks.0.up"},
        """\
'flat' at blocks.0.up does not give what it declares:
  A: shape [2], expected [2, 8]
`derive` and `init` together give every tensor that `tensors` declares""",
    ),
    (
        author.SiteError,
        _site,
        {"field": "r", "fields": ("r",)},
        "r: 9 is larger than this layer allows; the largest possible is 8",
    ),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name files as the caller does."""
    monkeypatch.chdir(tmp_path)


def provoked(provoke: Callable[[Make], None], blocks: Make) -> ll.LoraLiteError:
    """The error, caught as every user can catch all of them."""
    try:
        provoke(blocks)
    except ll.LoraLiteError as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "provoke", "fields", "message"), GOLDEN, ids=[case[0].__name__ for case in GOLDEN]
)
def test_the_whole_message(
    blocks: Make, error: Any, provoke: Any, fields: Mapping[str, Any], message: str
) -> None:
    """One error of each class, as a user sees it and as a program does."""
    raised = provoked(provoke, blocks)
    assert type(raised) is error
    assert str(raised) == message
    assert {name: getattr(raised, name) for name in fields} == fields


def test_every_class_has_a_golden_message() -> None:
    """Of all classes but the root, which is raised for nothing of its own."""
    classes = {
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, ll.LoraLiteError)
    }
    assert {case[0] for case in GOLDEN} == classes - {ll.LoraLiteError}


@pytest.mark.parametrize("provoke", [case[1] for case in GOLDEN])
def test_errors_survive_pickling_and_copying(blocks: Make, provoke: Callable[[Make], None]) -> None:
    """Process pools pickle what their workers raise: class, message and fields come through."""
    raised = provoked(provoke, blocks)
    for twin in (pickle.loads(pickle.dumps(raised)), copy.copy(raised), copy.deepcopy(raised)):
        assert type(twin) is type(raised)
        assert str(twin) == str(raised)
        assert vars(twin) == vars(raised)
        assert twin != raised
        assert twin in {twin}


def test_the_tree() -> None:
    """Every error has one root, and is what Python calls such an error too."""
    tree = {
        ll.FieldError: (ll.LoraLiteError, ValueError),
        ll.TargetError: (ll.LoraLiteError, ValueError),
        ll.PluginError: (ll.LoraLiteError, ImportError),
        ll.CalibrationError: (ll.LoraLiteError, ValueError),
        ll.AdapterError: (ll.LoraLiteError, RuntimeError),
        ll.AdapterFileError: (ll.LoraLiteError, ValueError),
        author.VariantDefinitionError: (ll.LoraLiteError, TypeError),
        author.VariantContractError: (ll.LoraLiteError, RuntimeError),
        ll.UnknownVariantError: (ll.PluginError, LookupError),
        author.LayerKindError: (ll.TargetError,),
        ll.MisfitError: (ll.TargetError,),
        author.SiteError: (ll.FieldError,),
        ll.BaseMismatchError: (ll.AdapterFileError,),
        ll.CheckError: (ll.AdapterError, AssertionError),
    }
    assert {cls: cls.__bases__ for cls in tree} == tree
    assert set(tree) == {case[0] for case in GOLDEN}


def test_the_pages_at_the_top_of_errors_are_right() -> None:
    """The tree drawn there has every class below the root, and the message shown is a real one."""
    page = errors.__doc__ or ""
    drawn = {line.split()[1] for line in page.splitlines() if line.lstrip().startswith(("├", "└"))}
    below = ll.LoraLiteError.__subclasses__()
    assert drawn == {cls.__name__ for cls in below if cls.__module__ == errors.__name__}
    message = next(message for error, _, _, message in GOLDEN if error is ll.MisfitError)
    assert " ".join(message.split()) in " ".join(page.split())


def test_an_old_call_with_one_sentence_still_works() -> None:
    """Variants written before errors had parts raise them with a message alone."""
    assert str(ll.AdapterError("no")) == "no"
    assert str(ll.AdapterError("no", fix="Do")) == "no. Do"
    assert str(ll.AdapterError("no", details=["a"], expected="Yes")) == "no:\n  a\nYes"
    assert str(ll.AdapterError("no", details=["a"])) == "no:\n  a"


def test_long_lists_are_cut() -> None:
    """A message of a model with thousands of layers stays readable."""
    lines = str(ll.TargetError("no", details=[f"layer {i}" for i in range(4000)])).splitlines()
    assert len(lines) == 14
    assert lines[-1] == "  ... and 3988 more"


def test_a_warning_points_at_the_users_line(blocks: Make) -> None:
    """Not at a line of lora-lite, whatever the depth from which it comes."""
    ll.attach(blocks(), Low()).save("adapter.safetensors")
    other = blocks()
    torch.nn.init.ones_(other.blocks[0].up.weight)  # type: ignore[union-attr, index, arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ll.load(other, "adapter.safetensors", variant=Low)
    (told,) = caught
    assert (told.category, told.filename) == (ll.AdapterWarning, __file__)
    assert str(told.message) == (
        "lora-lite: adapter.safetensors was made on a base with other weights: 1 of 4 layers "
        "differ by more than rounding to bfloat16:\n  blocks.0.up\ncheck_base=False silences this"
    )
