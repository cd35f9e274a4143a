"""Arguments: every wrong value is an error of ours that names the argument; right ones may be of
unusual types.

A fuzzer draws a call, one of its arguments, and a wrong value for it; everything else about the
call is right. What is right for an argument is said once, in `ARGUMENTS`, by the values of a pool
that are not wrong.
"""

from __future__ import annotations

import enum
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lora_lite as ll
import numpy as np
import pytest
import torch
from lora_lite_antipasto import AntiPaSTO
from lora_lite_delora import DeLoRA
from lora_lite_lora import LoRA
from torch import nn

Make = Callable[..., nn.Module]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]
NAN, INF = float("nan"), float("inf")


class Colour(enum.Enum):
    """Something that is neither a text nor a number."""

    RED = 1


# Values that no argument takes.
NONSENSE: tuple[Any, ...] = (
    object(), Colour.RED, lambda: 0, NotImplemented, Ellipsis, 1j, nn.Linear, slice(3),
    np.datetime64("now"),
    torch.ones(2, 2, dtype=torch.bool), np.ones((2, 2)), bytearray(b"up"), memoryview(b"up"),
    ValueError("up"), type,
    np.array(None),
)  # fmt: skip

NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    3,
    2**70,
    0.5,
    -2.5,
    NAN,
    INF,
    -INF,
    np.int64(1),
    np.float32(2),
)
BOOLS: tuple[Any, ...] = (True, False, np.True_)
BYTES: tuple[Any, ...] = (b"", b"up", re.compile(b"up"))
HOLDERS: tuple[Any, ...] = (
    [3], [None], [True], ["up", 3], [["up"]], (1.5,), [b"up"], [object()], {"up": 3}, {3: "up"},
    [0, "a"],
)  # fmt: skip
OVERRIDES: tuple[Any, ...] = (
    [], (), "", 0, False, "up", ["up"], [("up", {"r": 2})], {"up": 3}, {"up": None}, {"up": "r"},
    {"up": []},
    {"up": ["r"]}, {3: {"r": 2}}, {None: {"r": 2}}, {"(": {"r": 2}}, {"nothing": {"r": 2}},
    {"up": {3: 2}},
    {"up": {"rank": 2}}, {"up": {"r": "2"}}, {"up": {"r": 0}}, {"up": {"r": True}},
    {"up": {"r": None}},
    {b"up": {"r": 2}}, {"up": LoRA()}, {"up": {"alpha": INF}}, {"up": {"targets": "x"}},
    {("up",): {"r": 2}},
)  # fmt: skip
NO_MODULE: tuple[Any, ...] = (None, "model", {}, [], nn.Linear, 3, [nn.Linear(2, 2)], torch.ones(2))
NO_VARIANT: tuple[Any, ...] = (
    None,
    "",
    LoRA,
    [],
    ["lora"],
    "no_such",
    "LoRA",
    {"lora": {}},
    b"lora",
    " lora",
)
NO_NAME: tuple[Any, ...] = (
    "",
    "a b",
    "a.b",
    "1st",
    "a-b",
    None,
    3,
    True,
    b"a",
    ["a"],
    "a\n",
    ("a",),
    "a\x00",
)
NO_DTYPE: tuple[Any, ...] = (
    torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "int8", "float8", "bool",
    "float", "nothing", "",
    "torch.int64", int, 32, True, ["float32"], np.int64, b"float32", torch.ones(1),
)  # fmt: skip
NO_SEED: tuple[Any, ...] = (
    True,
    False,
    np.True_,
    1.0,
    NAN,
    "1",
    None,
    [1],
    (0,),
    b"1",
    torch.ones(1),
    {},
    1j,
)
NO_CALIBRATION: tuple[Any, ...] = (
    3, 1.5, True, torch.ones(2, 8), {}, {"x": torch.ones(9, 8)}, [], (), nn.Linear, "text",
    ["text"], [None], [{}],
    [{3: torch.ones(9, 8)}], [torch.ones(9, 5)], iter(()), [torch.ones(9, 8), "text"], object(),
)  # fmt: skip
NO_SCALE: tuple[Any, ...] = (
    None,
    True,
    False,
    "1",
    NAN,
    INF,
    -INF,
    [1.0],
    (),
    {},
    1j,
    np.True_,
    np.ones(2),
    b"1",
)
NO_DECAY: tuple[Any, ...] = (
    None,
    True,
    False,
    "0.1",
    NAN,
    INF,
    -0.1,
    -INF,
    [0.1],
    {},
    1j,
    np.nan,
    torch.ones(2),
)
NO_PATH: tuple[Any, ...] = (
    None,
    3,
    0,
    True,
    1.5,
    object(),
    [],
    ["a"],
    {},
    1j,
    Ellipsis,
    "",
    "\x00",
    "a\ud800",
)
NO_BOOL: tuple[Any, ...] = (
    None,
    "",
    "yes",
    "False",
    2,
    -1,
    1.0,
    [],
    [False],
    {},
    object(),
    np.ones(2),
)
NO_RENAME: tuple[Any, ...] = (
    3, "a", ["a"], [("a", "b")], {"(": "x"}, {3: "x"}, {"a": 3}, {"a": None}, {None: "a"},
    {"blocks": r"\9"},
    {b"a": b"b"}, True, {"a": ["b"]}, {"blocks": r"\g<no>"},
)  # fmt: skip
NO_CLASS: tuple[Any, ...] = ("lora", 3, nn.Linear, LoRA(), object(), [3], AntiPaSTO, True, int)

NO_FIELD: Mapping[str, tuple[Any, ...]] = {
    "r": (0, -1, True, "8", None, 4.0, NAN, INF, 99, [8], 1j, np.True_, np.float64(2.5), 2**70),
    "alpha": (0, -1.0, True, "16", None, NAN, INF, [16], {}, 1j, np.nan, np.inf),
    "dropout": (-0.1, 1.0, 1.5, True, "0", None, NAN, INF, [0], np.float32(1)),
    "rslora": (0, 1, "yes", None, 1.0, [], "true"),
}


@dataclass(frozen=True)
class Case:
    """One argument of one function, and the values that are wrong for it.

    Attributes:
        argument: its name, which the error must hold.
        wrong: the values.
        call: makes the call on a model, with this value and everything else right.
        named: what the error must hold, where that is not the argument's name.
    """

    function: str
    argument: str
    wrong: tuple[Any, ...]
    call: Callable[[nn.Module, Any], Any]
    named: str = ""

    def __str__(self) -> str:
        return f"{self.function}({self.argument})"


def _attach(model: Any, variant: Any = "lora", **arguments: Any) -> Any:
    return ll.attach(model, variant, **{"name": "another", **arguments})


def _calibrated(model: nn.Module, data: Any) -> Any:
    return _attach(model, "eva", r=2, calibration=data)


def _keyword(call: Callable[..., Any], name: str) -> Callable[[nn.Module, Any], Any]:
    return lambda model, value: call(model, **{name: value})


def _plan(model: Any, variant: Any = "lora", **arguments: Any) -> Any:
    return ll.plan(model, variant, **arguments)


WRONG_PATTERNS = (
    *NUMBERS, *BOOLS, "up(", "*", "nothing", "\x00", "\ud800", "x" * 10_000, *BYTES, *HOLDERS,
    *NONSENSE,
)  # fmt: skip
WRONG_LAYERS = (
    2, -1, 2**70, 0.5, NAN, INF, "0", "all", "", [], (), [0, "a"], [0, 2], [1.0], [True], True,
    [None], [[0]],
    {"0"}, b"\x00", [b"0"], np.array([0.5]), np.array([True]), *NONSENSE,
)  # fmt: skip


def cases(folder: Path) -> list[Case]:
    """Every argument of every function; `folder` holds a file of an adapter."""
    file = folder / "file"
    found = []
    for function, call in (("attach", _attach), ("plan", _plan)):
        keyword = partial(_keyword, call)
        found += [
            Case(function, "model", NO_MODULE, lambda _, v, call=call: call(v), "model|Module"),
            Case(function, "variant", NO_VARIANT, lambda m, v, call=call: call(m, v)),
            Case(function, "targets", ((), [], {}, *WRONG_PATTERNS), keyword("targets")),
            Case(function, "exclude", WRONG_PATTERNS, keyword("exclude")),
            Case(function, "layers", WRONG_LAYERS, keyword("layers")),
            Case(
                function, "overrides", (*OVERRIDES, *NONSENSE), keyword("overrides"),
                "overrides|variant 'lora'",  # a field in it is complained of as a field
            ),
            Case(
                function, "strength", (0, -1.0, INF, NAN, True, "1"),
                lambda m, v, call=call: call(m, "delora", strength=v),
            ),
            Case(
                function, "max_angle", (0, -1.0, INF, NAN, True, "1", 1e-320),
                lambda m, v, call=call: call(m, "antipasto", r=4, max_angle=v),
            ),
            *(Case(function, field, wrong, keyword(field)) for field, wrong in NO_FIELD.items()),
        ]  # fmt: skip
    found += [
        Case("attach", "name", (*NO_NAME, *NONSENSE), lambda m, v: _attach(m, name=v)),
        Case("attach", "dtype", (*NO_DTYPE, *NONSENSE), lambda m, v: _attach(m, dtype=v)),
        Case("attach", "seed", (*NO_SEED, *NONSENSE), lambda m, v: _attach(m, seed=v)),
        Case("attach", "calibration", NO_CALIBRATION, _calibrated),
        Case("attach", "calibration", ([torch.ones(9, 8)], 3, []), lambda m, v: _attach(m,
        calibration=v)),
        Case("load", "model", NO_MODULE, lambda _, v: ll.load(v, file), "model|Module"),
        Case("load", "path", (*NO_PATH, *NONSENSE), lambda m, v: ll.load(m, v),
        "path|cannot be read|safetensors|file"),
        Case("load", "name", (*NO_NAME, *NONSENSE), lambda m, v: ll.load(m, file, name=v)),
        Case("load", "variant", (*NO_CLASS, *NONSENSE), lambda m, v: ll.load(m, file, variant=v,
        name="b")),
        Case("load", "check_base", NO_BOOL, lambda m, v: ll.load(m, file, name="b", check_base=v)),
        Case("load", "dtype", (*NO_DTYPE, *NONSENSE), lambda m, v: ll.load(m, file, name="b",
        dtype=v)),
        Case("load", "rename", (*NO_RENAME, *NONSENSE), lambda m, v: ll.load(m, file, name="b",
        rename=v)),
        Case("save", "model", NO_MODULE, lambda _, v: ll.save(v, folder / "out"), "model|Module"),
        Case("save", "path", (*NO_PATH, *NONSENSE), lambda m, v: ll.save(m, v),
        "path|cannot be written|file"),
        Case("save", "name", ("", "x", 3, True, [], b"there", object()), lambda m, v: ll.save(m,
        folder / "out", v)),
        Case("save", "derived", NO_BOOL, lambda m, v: ll.save(m, folder / "out", derived=v)),
        Case("detach", "name", ("", "x", 3, True, [], b"there", object()), lambda m,
        v: ll.detach(m, v)),
        Case("adapters", "model", NO_MODULE, lambda _, v: ll.adapters(v), "model|Module"),
        Case("scale", "scale", (*NO_SCALE, *NONSENSE), lambda m, v: setattr(there(m), "scale", v)),
        Case("param_groups", "weight_decay", (*NO_DECAY, *NONSENSE), lambda m,
        v: there(m).param_groups(v)),
    ]  # fmt: skip
    return found


def there(model: nn.Module) -> ll.Adapter:
    """The adapter that the model has before each call."""
    return ll.adapters(model)["there"]


def fuzz(model: nn.Module, untouched: Untouched, folder: Path, number: int) -> None:
    """Draw calls; collect what is not as promised."""
    known, rng, found = cases(folder), random.Random(0), []
    everything = [(case, value) for case in known for value in case.wrong]
    drawn = [*everything, *(rng.choice(everything) for _ in range(number - len(everything)))]
    for case, value in drawn[:number]:
        what = f"{case} = {repr(value)[:60]}"
        try:
            with untouched(model):
                case.call(model, value)
        except ll.LoraLiteError as error:
            text = str(error)
            if not re.search(case.named or case.argument, text):
                found.append(f"{what}: not named in {text.splitlines()[0]:.90}")
        except AssertionError:
            found.append(f"{what}: taken, and the model is changed")
        except BaseException as error:
            found.append(f"{what}: {type(error).__name__}: {error!s:.90}")
        else:
            found.append(f"{what}: taken")
        for name in set(ll.adapters(model)) - {"there"}:
            ll.detach(model, name)
        if not ll.adapters(model):
            ll.attach(model, "lora", r=2, name="there")
        there(model).scale = 1.0
    found = sorted(set(found))
    assert not found, f"{len(found)} of {number}:\n" + "\n".join(found)


@pytest.fixture
def prepared(blocks: Make, tmp_path: Path) -> nn.Module:
    """A model with an adapter, beside a file of it."""
    model = blocks()
    adapter = ll.attach(model, "lora", r=2, name="there")
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(0.1)
    adapter.save(tmp_path / "file")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_arguments(prepared: nn.Module, untouched: Untouched, tmp_path: Path) -> None:
    """Promise: every wrong value of every argument is an error of ours that names the argument, and
    the model is as it was."""
    fuzz(prepared, untouched, tmp_path, 1_500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_many_wrong_arguments(prepared: nn.Module, untouched: Untouched, tmp_path: Path) -> None:
    """Promise: as above, in 12,000 calls one after another on the same model."""
    fuzz(prepared, untouched, tmp_path, 12_000)


def test_several_wrong_arguments_at_once(prepared: nn.Module, untouched: Untouched) -> None:
    """Promise: a call with everything wrong is an error of ours too, whichever it names first."""
    rng = random.Random(0)
    pools = {
        "name": NO_NAME, "targets": WRONG_PATTERNS, "exclude": WRONG_PATTERNS,
        "layers": WRONG_LAYERS,
        "overrides": OVERRIDES, "calibration": NO_CALIBRATION, "dtype": NO_DTYPE, "seed": NO_SEED,
        **NO_FIELD,
    }  # fmt: skip
    with untouched(prepared):
        for _ in range(200):
            wrong = {key: rng.choice(pools[key]) for key in rng.sample(sorted(pools), 3)}
            with pytest.raises(ll.LoraLiteError):
                ll.attach(prepared, "lora", **{"name": "another", **wrong})


# --- right values of unusual types


def same_adapter(one: ll.Adapter, other: ll.Adapter) -> bool:
    """Whether two adapters have the same fields and tensors."""
    mine, theirs = one.state_dict(), other.state_dict()
    return (
        one.sites == other.sites
        and mine.keys() == theirs.keys()
        and all(
            torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype
            for name, value in mine.items()
        )
    )


UNUSUAL: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seed, np.int64": ({"seed": np.int64(7)}, {"seed": 7}),
    "seed, np.uint8": ({"seed": np.uint8(7)}, {"seed": 7}),
    "r, np.int64": ({"r": np.int64(3)}, {"r": 3}),
    "alpha, np.float64": ({"alpha": np.float64(3.5)}, {"alpha": 3.5}),
    "alpha, np.float32": ({"alpha": np.float32(3.5)}, {"alpha": 3.5}),
    "alpha, an integer": ({"alpha": 4}, {"alpha": 4.0}),
    "alpha, np.int32": ({"alpha": np.int32(4)}, {"alpha": 4.0}),
    "dropout, np.float16": ({"dropout": np.float16(0.5)}, {"dropout": 0.5}),
    "targets, compiled": ({"targets": re.compile("up$")}, {"targets": "up$"}),
    "targets, compiled with a flag": ({"targets": re.compile("UP$", re.I)}, {"targets": "up$"}),
    "targets, both": ({"targets": ["up$", re.compile("down")]}, {"targets": ["up$", "down"]}),
    "targets, a set": ({"targets": {"up$", "down$"}}, {"targets": ["up$", "down$"]}),
    "targets, np.str_": ({"targets": np.str_("up$")}, {"targets": "up$"}),
    "targets, a generator": ({"targets": (p for p in ("up$",))}, {"targets": "up$"}),
    "exclude, compiled": ({"exclude": re.compile("up$")}, {"exclude": "up$"}),
    "overrides, compiled": (
        {"overrides": {re.compile("up$"): {"r": np.int64(1)}}},
        {"overrides": {"up$": {"r": 1}}},
    ),
    "overrides, other mappings": (
        {"overrides": MappingProxyType({"up$": OrderedDict(r=1)})},
        {"overrides": {"up$": {"r": 1}}},
    ),
    "layers, np.int64": ({"layers": np.int64(1)}, {"layers": 1}),
    "layers, an array": ({"layers": np.array([0, 1])}, {"layers": [0, 1]}),
    "layers, a range": ({"layers": range(1)}, {"layers": 0}),
    "layers, a set": ({"layers": {1}}, {"layers": 1}),
    "layers, a generator": ({"layers": (i for i in (0,))}, {"layers": 0}),
    "layers, repeated": ({"layers": [1, 1]}, {"layers": 1}),
    "dtype, a text": ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    "dtype, another text": ({"dtype": "float64"}, {"dtype": torch.float64}),
    "name, np.str_": ({"name": np.str_("n")}, {"name": "n"}),
    "name, beyond ASCII": ({"name": "größe_模"}, {"name": "größe_模"}),
}


@pytest.mark.parametrize(("given", "plain"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_types_are_taken_and_saved(
    blocks: Make, tmp_path: Path, given: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Promise: numbers of numpy, compiled patterns, texts for dtypes and any iterable are taken
    where the plain thing is, do the same, and come back from a file.
    """
    adapter = ll.attach(blocks(), "lora", **{"r": 2, **given})
    expected = ll.attach(blocks(), "lora", **{"r": 2, **plain})
    assert same_adapter(adapter, expected)
    assert adapter.name == expected.name
    assert (type(adapter.seed), adapter.seed) == (int, expected.seed)
    for variant in adapter.sites.values():
        values = variant.model_dump().values()
        assert {type(value) for value in values} <= {int, float, bool}
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    adapter.save(tmp_path / "a")
    assert same_adapter(ll.load(blocks(), tmp_path / "a", name=adapter.name), adapter)


@pytest.mark.parametrize("value", [2, 0, -1.5, np.float32(0.5), np.int64(3), np.float64(1e-3)])
def test_scales_of_unusual_types(blocks: Make, tmp_path: Path, value: Any) -> None:
    """Promise: the scale may be any finite number, is a float, and comes back from a file."""
    adapter = ll.attach(blocks(), "lora", r=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    adapter.scale = value
    assert (type(adapter.scale), adapter.scale) == (float, float(value))
    if not value:
        return  # saving it is told of: test_told.py
    adapter.save(tmp_path / "a")
    assert ll.load(blocks(), tmp_path / "a").scale == float(value)


@pytest.mark.parametrize("value", [0, 0.1, 1, np.float32(0.5), np.int64(0)])
def test_weight_decays_of_unusual_types(blocks: Make, value: Any) -> None:
    """Promise: so may the weight decay; groups hold plain numbers, which a
    checkpoint of the optimizer can be read with."""
    groups = ll.attach(blocks(), "lora", r=2).param_groups(value)
    assert {type(group["weight_decay"]) for group in groups} <= {int, float}
    assert groups[0]["weight_decay"] == float(value)


@pytest.mark.parametrize("form", [str, Path], ids=["str", "Path"])
def test_paths_of_unusual_types(blocks: Make, tmp_path: Path, form: Any) -> None:
    """Promise: a path is a text or a path-like object, for load(dtype=) as a text too."""
    adapter = ll.attach(blocks(), "lora", r=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    adapter.save(form(tmp_path / "a"))
    again = ll.load(blocks(), form(tmp_path / "a"), dtype="bfloat16")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_instances_validate_as_names_do() -> None:
    """Promise: numbers of numpy in the typed form are plain ones too."""
    made = LoRA(r=np.int64(2), alpha=np.float64(3.0))
    assert made == LoRA(r=2, alpha=3.0)
    assert {type(value) for value in (made.r, made.alpha)} == {int, float}
    assert DeLoRA(r=np.int32(2)) == DeLoRA(r=2)
    for wrong in ({"r": True}, {"r": np.True_}, {"alpha": INF}, {"r": np.float64(2)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRA(**wrong)
