"""Bad input: each case has a clear error, and leaves the model bit for bit as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant, VariantContractError
from lora_lite_antipasto import AntiPaSTO
from lora_lite_lora import LoRA
from safetensors.torch import save_file
from torch import Tensor, nn

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Refused = Callable[..., AbstractContextManager[Any]]
Rewrite = Callable[..., None]
Make = Callable[..., nn.Module]


# --- attach and plan


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("no_such_method", ("'no_such_method'", "antipasto", "lora")),
        ("antipato", ("'antipato'", "Did you mean 'antipasto'")),
        ("lroa", ("'lroa'", "Did you mean", "'lora'")),
        ("LoRA", ("'LoRA'",)),
        ("", ("''",)),
        ("x; rm -rf /", ("'x; rm -rf /'",)),
    ],
)
def test_unknown_variant(
    blocks: Make, refused: Refused, variant: str, says: tuple[str, ...]
) -> None:
    """A name that nothing provides is called unknown, with near names, and is in no pip command."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with refused(
            model, ll.UnknownVariantError, says, plugin=variant, distributions=()
        ) as caught:
            function(model, variant)
        assert "pip install" not in str(caught.value)


@pytest.mark.parametrize(
    ("given_fields", "wrong", "says"),
    [
        ({"rr": 4}, ("rr",), ("Did you mean 'r'", "r, alpha, rslora, dropout")),
        ({"dropuot": 0.1}, ("dropuot",), ("Did you mean 'dropout'",)),
        ({"r": 0}, ("r",), ("r=0", "greater than 0")),
        ({"r": 4.0, "alfa": 1.0}, ("r", "alfa"), ("r=4.0", "Did you mean 'alpha'")),
        ({"target": "up"}, ("target",), ("'target'",)),
    ],
)
def test_unknown_or_invalid_field(
    blocks: Make,
    refused: Refused,
    given_fields: dict[str, Any],
    wrong: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    """The error names variant, fields, values and near fields, all complaints in one message."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with refused(model, ll.FieldError, ("'lora'", *says), variant="lora", fields=wrong):
            function(model, "lora", **given_fields)


@pytest.mark.parametrize(
    ("variant", "fields", "wrong"),
    [(LoRA(), {"r": 4}, ("r",)), (LoRA, {}, ()), (None, {}, ()), (3, {}, ())],
)
def test_neither_name_nor_instance(
    blocks: Make, refused: Refused, variant: Any, fields: Any, wrong: tuple[str, ...]
) -> None:
    """Fields beside an instance, a class for an instance, or nothing of both: said in words."""
    model = blocks()
    with refused(model, ll.FieldError, (str(variant),), fields=wrong):
        ll.attach(model, variant, **fields)


def test_rank_larger_than_the_layer(blocks: Make, refused: Refused) -> None:
    """All layers that do not fit are listed, each with its shape and the largest possible rank."""
    model = blocks()
    layers = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    says = ("4 of 4 layers", "blocks.0.up (8 -> 12)", "lora: r: 9", "largest possible is 8")
    for function in (ll.attach, ll.plan):
        with refused(model, ll.MisfitError, says, layers=layers):
            function(model, "lora", r=9)


@pytest.mark.parametrize(
    ("targets", "argument", "says"),
    [
        (r"upp$", "targets", ("targets='upp$'", "Did you mean 'up'")),
        ([r"up$", r"nothing"], "targets", ("'nothing'", "up x 2", "down x 2", "lm_head x 1")),
        (r"up$|(", "targets", ("targets='up$|('", "not a regular expression")),
        ((), "targets", ("targets=()",)),
        ([3], "targets", ("targets=3", "int")),
        (r"lm_head", "exclude", ("targets='lm_head'", "output head", "exclude=()")),
        ([r"up$", r"lm_head"], "exclude", ("targets='lm_head'", "exclude=()")),
    ],
)
def test_pattern_without_match(
    blocks: Make, refused: Refused, targets: Any, argument: str, says: tuple[str, ...]
) -> None:
    """A pattern that chooses nothing is an error, also beside one that does.

    Near names and the model's layers are shown; what the default exclusion takes away is named.
    """
    model = blocks()
    layers = ("lm_head",) if argument == "exclude" else ()
    for function in (ll.attach, ll.plan):
        with refused(model, ll.TargetError, says, argument=argument, layers=layers):
            function(model, "lora", targets=targets)


@pytest.mark.parametrize(
    ("arguments", "wrong", "says"),
    [
        ({"layers": 2}, "layers", ("layers=[2]", "0 to 1")),
        ({"layers": [0, -1]}, "layers", ("layers=[-1, 0]", "0 to 1")),
        ({"layers": []}, "layers", ("layers=[]",)),
        ({"layers": 0, "targets": "stem"}, "layers", ("layers=[0]", "targets='stem'")),
        ({"exclude": "upp"}, "exclude", ("exclude='upp'", "Did you mean 'up'")),
        ({"overrides": {"stem": {"r": 2}}}, "overrides", ("overrides='stem'", "up x 2")),
        ({"overrides": {"(": {"r": 2}}}, "overrides", ("overrides='('",)),
    ],
)
def test_bad_choice_of_layers(
    blocks: Make, refused: Refused, arguments: dict[str, Any], wrong: str, says: tuple[str, ...]
) -> None:
    """Indices out of range, exclusions and overrides without a match: each says what there is."""
    model = blocks()
    with refused(model, ll.TargetError, says, argument=wrong):
        ll.attach(model, "lora", **arguments)


def test_bad_override_field(blocks: Make, refused: Refused) -> None:
    """A misspelt field in overrides is an error like any other."""
    model = blocks()
    with refused(model, ll.FieldError, variant="lora", fields=("rank",)):
        ll.attach(model, "lora", overrides={"up": {"rank": 2}})


@pytest.mark.parametrize("name", ["", "my adapter", "a.b", "1st", "a/b"])
def test_bad_adapter_name(blocks: Make, refused: Refused, name: str) -> None:
    """An adapter's name becomes part of attribute names: what cannot is refused."""
    model = blocks()
    with refused(model, ll.AdapterError, (f"name={name!r}", "letters")):
        ll.attach(model, "lora", r=2, name=name)


def test_name_in_use(blocks: Make, refused: Refused, tmp_path: Path) -> None:
    """A second adapter of the same name is refused, and the first goes on working."""
    model = blocks()
    ll.attach(model, "lora", r=2, name="a").save(tmp_path / "a.safetensors")
    with refused(model, ll.AdapterError, ("'a'", "In use: a"), adapter="a"):
        ll.attach(model, "lora", r=2, name="a")
    with refused(model, ll.AdapterError, ("'a'",), adapter="a"):
        ll.load(model, tmp_path / "a.safetensors", name="a")
    model.blocks[0].up.lora_b_A = 3  # something of the user's own
    with refused(model, ll.AdapterError, ("'lora_b_A'",), layer="blocks.0.up"):
        ll.attach(model, "lora", r=2, name="b")


def test_models_that_cannot_carry_an_adapter(blocks: Make, refused: Refused) -> None:
    """Not a module, no linear layer, no repeated block, the meta device, an integer dtype."""
    with refused(None, ll.AdapterError, ("dict", "torch.nn.Module")):
        ll.attach({}, "lora")  # type: ignore[arg-type]
    relu = nn.ReLU()
    with refused(relu, ll.TargetError, ("ReLU", "no layer"), argument="targets"):
        ll.attach(relu, "lora")
    flat = nn.Sequential(nn.Linear(3, 3))
    says = ("no repeated blocks", "0 x 1", "targets=")
    with refused(flat, ll.TargetError, says, argument="targets"):
        ll.attach(flat, "lora")
    with torch.device("meta"):
        empty = blocks()
    with refused(None, ll.AdapterError, ("meta device",), layer="blocks.0.up"):
        ll.attach(empty, "lora", r=2)
    assert not any("lora" in key for key in empty.state_dict())
    model = blocks()
    with refused(model, ll.AdapterError, ("dtype=torch.int8", "float32")):
        ll.attach(model, "lora", r=2, dtype=torch.int8)


# --- calibration


@pytest.mark.parametrize(
    ("fields", "calibration", "batch", "says"),
    [
        ({}, [torch.randn(4, 8)], None, ("antipasto needs no calibration data",)),
        ({"select": "activation"}, None, None, ("antipasto(", "needs", "calibration=")),
        ({"select": "activation"}, [], None, ("calibration= is empty",)),
        (
            {"select": "activation"},
            [torch.randn(9, 8), torch.randn(9, 5)],
            1,
            ("batch 1 (float32[9, 5])", "RuntimeError"),
        ),
        (
            {"select": "activation"},
            [{"y": torch.randn(2, 3)}],
            0,
            ("batch 0 (y: float32[2, 3])", "TypeError", "'y'"),
        ),
        ({"select": "activation"}, {"x": torch.randn(9, 8)}, None, ("x: float32[9, 8]", "[batch]")),
        ({"select": "activation"}, torch.randn(9, 8), None, ("float32[9, 8]", "[batch]")),
        ({"select": "activation"}, 3, None, ("calibration= is int", "DataLoader")),
    ],
)
def test_bad_calibration(
    blocks: Make,
    refused: Refused,
    fields: Any,
    calibration: Any,
    batch: int | None,
    says: tuple[str, ...],
) -> None:
    """Missing, superfluous, empty, rejected by the model, or one batch instead of several."""
    model = blocks()
    with refused(model, ll.CalibrationError, says, batch=batch):
        ll.attach(model, AntiPaSTO(r=4, **fields), calibration=calibration)


def test_site_never_called_in_calibration(refused: Refused) -> None:
    """A layer that the data never reaches has no statistics: it is named."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers[0](x)
            return out

    model = Skipping()
    with refused(model, ll.CalibrationError, ("layers.1",), layers=("layers.1",)):
        ll.attach(model, AntiPaSTO(r=4, select="activation"), calibration=[torch.randn(9, 8)])


# --- an exception in the middle


class Failing(Variant, name="failing"):
    """Fails at the layer whose shapes are 12 -> 8."""

    stage: str

    def _fail(self, site: Site, stage: str) -> None:
        if self.stage == stage and site.d_in == 12:
            raise ZeroDivisionError(stage)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        self._fail(site, "tensors")
        return {"A": TensorSpec((site.d_out,))}

    def derive(self, site: Site) -> dict[str, Tensor]:
        self._fail(site, "derive")
        return {}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        self._fail(site, "init")
        values = {"A": torch.zeros(site.d_out)}
        if site.d_in != 12:
            return values
        return {
            "missing": {},
            "extra": {**values, "B": torch.zeros(1)},
            "shape": {"A": torch.zeros(3)},
            "kind": {"A": torch.zeros(site.d_out, dtype=torch.int64)},
            "nan": {"A": torch.full((site.d_out,), torch.nan)},
        }.get(self.stage, values)

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["A"] * y


@pytest.mark.parametrize("stage", ["tensors", "derive", "init"])
def test_exception_in_a_variant(blocks: Make, untouched: Untouched, stage: str) -> None:
    """A variant that raises at its second site leaves no trace at the first."""
    model = blocks()
    with untouched(model), pytest.raises(ZeroDivisionError, match=stage):
        ll.attach(model, Failing(stage=stage))


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("missing", ("A: missing", "[8]")),
        ("extra", ("B: extra", "declared: A")),
        ("shape", ("A: shape [3]", "[8]")),
        ("kind", ("A: dtype torch.int64", "floating-point")),
        ("nan", ("A: has values that are not finite",)),
    ],
)
def test_variant_that_breaks_its_word(
    blocks: Make, refused: Refused, stage: str, says: tuple[str, ...]
) -> None:
    """Start values other than declared are named with variant, layer and declaration."""
    model = blocks()
    fields = {"variant": "failing", "layer": "blocks.0.down"}
    with refused(model, VariantContractError, says, **fields):
        ll.attach(model, Failing(stage=stage))


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_exception_while_tensors_are_registered(
    blocks: Make, untouched: Untouched, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Whichever registration fails, those before it are taken back, also beside another adapter."""
    fresh, model = blocks(), blocks()
    first = ll.attach(model, "lora", r=2, name="first")
    register, count = nn.Module.register_parameter, 0

    def sometimes(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise MemoryError
        register(self, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", sometimes)
    for target in (model, fresh):
        count = 0
        with untouched(target), pytest.raises(MemoryError):
            ll.attach(target, "lora", r=2, name="second")
    assert list(ll.adapters(model)) == ["first"]
    first.detach()


# --- files


@pytest.fixture
def file(blocks: Make, tmp_path: Path) -> Path:
    """A saved LoRA adapter of `blocks()`."""
    path = tmp_path / "adapter.safetensors"
    ll.attach(blocks(), "lora", r=2).save(path)
    return path


def _nan(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.1.up.A"][0, 0] = torch.nan


def _inf(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.1.up.B"][0, 0] = -torch.inf


def _missing(t: dict[str, Tensor], _: Any) -> None:
    del t["blocks.0.down.B"]


def _extra(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.0.down.C"] = torch.zeros(2)


def _extra_site(t: dict[str, Tensor], _: Any) -> None:
    t["elsewhere.A"] = torch.zeros(2)


def _reshaped(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.0.up.A"] = t["blocks.0.up.A"].T.contiguous()


def _renamed(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.0.up.a"] = t.pop("blocks.0.up.A")


def _retyped(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.0.up.A"] = t["blocks.0.up.A"].half()


def _integers(t: dict[str, Tensor], _: Any) -> None:
    t["blocks.0.up.A"] = t["blocks.0.up.A"].long()


def _newer(_: Any, h: dict[str, Any]) -> None:
    h.update(format=99, core="9.9", something_new=True)


def _newer_variant(_: Any, h: dict[str, Any]) -> None:
    h["configurations"][0]["variant_format"] = 7


def _not_installed(_: Any, h: dict[str, Any]) -> None:
    h["configurations"][0].update(variant="dreamt_up", provider="lora-lite-dreams 1.2")


def _of_its_own(h: dict[str, Any], path: str, fields: str) -> None:
    """Give one layer a configuration of its own."""
    h["configurations"].append({**h["configurations"][0], "fields": fields})
    h["sites"][path] = len(h["configurations"]) - 1


def _bad_field(_: Any, h: dict[str, Any]) -> None:
    _of_its_own(h, "blocks.0.up", '{"r": 2, "ranks": 3}')


def _rank_too_large(_: Any, h: dict[str, Any]) -> None:
    _of_its_own(h, "blocks.0.up", '{"r": 200}')


def _no_configuration(_: Any, h: dict[str, Any]) -> None:
    h["sites"]["blocks.0.up"] = 5


def _no_such_site(_: Any, h: dict[str, Any]) -> None:
    h["sites"]["blocks.0.upp"] = h["sites"].pop("blocks.0.up")


def _no_site(_: Any, h: dict[str, Any]) -> None:
    h["sites"] = {}


def _damaged(_: Any, h: dict[str, Any]) -> None:
    h["sites"] = 3


def _wrong(*tensors: str) -> dict[str, Any]:
    return {"tensors": tensors}


# what is changed, the error, its fields, and what it must say
FILES: list[tuple[Any, type[Exception], dict[str, Any], tuple[str, ...]]] = [
    (_nan, ll.AdapterFileError, _wrong("blocks.1.up.A"), ("not finite",)),
    (_inf, ll.AdapterFileError, _wrong("blocks.1.up.B"), ("not finite",)),
    (_missing, ll.AdapterFileError, _wrong("blocks.0.down.B"), ("missing", "[8, 2]")),
    (_extra, ll.AdapterFileError, _wrong("blocks.0.down.C"), ("extra",)),
    (_extra_site, ll.AdapterFileError, _wrong("elsewhere.A"), ("extra",)),
    (_reshaped, ll.AdapterFileError, _wrong("blocks.0.up.A"), ("[8, 2]", "[2, 8]")),
    (
        _renamed,
        ll.AdapterFileError,
        _wrong("blocks.0.up.a", "blocks.0.up.A"),
        ("A: missing", "a: extra"),
    ),
    (_retyped, ll.AdapterFileError, _wrong("blocks.0.up.A"), ("torch.float16", "A float32")),
    (_integers, ll.AdapterFileError, _wrong("blocks.0.up.A"), ("torch.int64", "A float32")),
    (_newer, ll.AdapterFileError, {}, ("format 99", "lora-lite-core 9.9", "up to 2", "--upgrade")),
    (_newer_variant, ll.AdapterFileError, {}, ("format 7", "'lora'", "lora-lite-lora", "up to 1")),
    (_not_installed, ll.UnknownVariantError, {"plugin": "dreamt_up"}, ()),
    (_bad_field, ll.AdapterFileError, {}, ("'lora'", "ranks")),
    (_rank_too_large, ll.AdapterFileError, {}, ("200", "blocks.0.up")),
    (_no_configuration, ll.AdapterFileError, {}, ("configuration",)),
    (_no_such_site, ll.AdapterFileError, {}, ("blocks.0.upp", "Did you mean 'blocks.0.up'")),
    (_no_site, ll.AdapterFileError, {}, ("sites",)),
    (_damaged, ll.AdapterFileError, {}, ("sites",)),
]


@pytest.mark.parametrize(
    ("change", "error", "fields", "says"), FILES, ids=[case[0].__name__[1:] for case in FILES]
)
def test_file_that_does_not_fit(
    file: Path,
    blocks: Make,
    refused: Refused,
    rewrite: Rewrite,
    change: Any,
    error: type[Exception],
    fields: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    """Whatever is wrong with a file is named, and nothing is attached."""
    rewrite(file, change)
    if error is ll.AdapterFileError:
        fields = {"path": str(file), **fields}
    model = blocks()
    with refused(model, error, says, **fields):
        ll.load(model, file)


def test_everything_wrong_is_listed_at_once(
    file: Path, blocks: Make, refused: Refused, rewrite: Rewrite
) -> None:
    """Five different faults, one message."""
    for change in (_nan, _missing, _extra_site, _reshaped, _retyped):
        rewrite(file, change)
    model = blocks()
    with refused(
        model, ll.AdapterFileError, ("not finite", "missing", "extra", "shape", "float16")
    ) as caught:
        ll.load(model, file)
    wrong = {"blocks.1.up.A", "blocks.0.down.B", "elsewhere.A", "blocks.0.up.A"}
    assert set(caught.value.tensors) == wrong


def test_retyped_frozen_tensor(
    blocks: Make, refused: Refused, rewrite: Rewrite, tmp_path: Path
) -> None:
    """A frozen tensor in another dtype than it was saved in is noticed like a trainable one."""
    ll.attach(blocks(), AntiPaSTO(r=4)).save(tmp_path / "a.safetensors")

    def change(t: dict[str, Tensor], _: Any) -> None:
        t["blocks.0.up.S"] = t["blocks.0.up.S"].double()
        t["blocks.0.up.U"] = t["blocks.0.up.U"].half()

    rewrite(tmp_path / "a.safetensors", change)
    model = blocks()
    says = ("torch.float64", "torch.float16")
    with refused(model, ll.AdapterFileError, says) as caught:
        ll.load(model, tmp_path / "a.safetensors")
    assert set(caught.value.tensors) == {"blocks.0.up.S", "blocks.0.up.U"}


@given(cut=st.floats(0, 0.999))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_truncated_file(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file cut anywhere, to nothing even, is an AdapterFileError."""
    folder = tmp_path_factory.mktemp("cut")
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = ll.attach(model, "lora", r=2, targets="0")
    adapter.save(folder / "whole")
    adapter.detach()
    data = (folder / "whole").read_bytes()
    (folder / "part").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, folder / "part")
    assert caught.value.path == str(folder / "part")
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_change_of_the_metadata_is_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, rewrite: Rewrite
) -> None:
    """Whatever stands in the metadata: the file loads, or an error of lora-lite says why not.

    In the second case nothing is attached.
    """
    folder = tmp_path_factory.mktemp("damaged")
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = ll.attach(model, AntiPaSTO(r=4), targets="0")
    adapter.save(folder / "a", derived=data.draw(st.booleans()))
    adapter.detach()
    junk = st.one_of(
        st.none(),
        st.integers(-3, 99),
        st.text(max_size=4),
        st.just([]),
        st.just({}),
        st.just({"0": "?"}),
    )

    def change(_: Any, header: dict[str, Any]) -> None:
        key = data.draw(st.sampled_from(sorted(header)))
        if isinstance(header[key], dict) and header[key] and data.draw(st.booleans()):
            header[key][data.draw(st.sampled_from([*header[key], "0"]))] = data.draw(junk)
        else:
            header[key] = data.draw(junk)

    rewrite(folder / "a", change)
    try:
        ll.load(model, folder / "a").detach()
    except ll.LoraLiteError:
        assert set(model.state_dict()) == {"0.weight", "0.bias"}
    except ll.AdapterWarning:
        pass  # warnings are errors here: the fingerprint differs, or the format is 1


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", b"\x00" * 100])
def test_something_else_than_an_adapter(
    blocks: Make, refused: Refused, tmp_path: Path, content: bytes
) -> None:
    """Text, a pickle, zeros, a missing file, a folder, a model's weights: nothing is executed."""
    (tmp_path / "file").write_bytes(content)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    model = blocks()
    for name in ("file", "no_such_file", ".", "weights"):
        path = tmp_path / name
        with refused(model, ll.AdapterFileError, (str(path),), path=str(path)):
            ll.load(model, path)


def test_another_base(blocks: Make, refused: Refused, tmp_path: Path) -> None:
    """Another base: an error where tensors were computed from it, a warning else.

    Neither with check_base=False.
    """
    ll.attach(blocks(), AntiPaSTO(r=4), name="a").save(tmp_path / "antipasto")
    ll.attach(blocks(), LoRA(r=2)).save(tmp_path / "lora")
    other = blocks()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    path = str(tmp_path / "antipasto")
    says = ("4 of 4 layers", "blocks.0.up", "check_base=False")
    with refused(other, ll.BaseMismatchError, says, path=path):
        ll.load(other, path)
    with pytest.warns(ll.AdapterWarning, match="4 of 4 layers"):
        ll.load(other, tmp_path / "lora").detach()
    ll.load(other, tmp_path / "lora", check_base=False).detach()
    ll.load(other, tmp_path / "antipasto", check_base=False).detach()


def test_the_same_base_in_another_precision_is_the_same(blocks: Make, tmp_path: Path) -> None:
    """float32, bfloat16 and float16 copies of one base take one another's files without a word."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ll.attach(blocks().bfloat16().to(dtype), AntiPaSTO(r=4)).save(tmp_path / "a")
        for other in (torch.float32, torch.bfloat16, torch.float16):
            ll.load(blocks().bfloat16().to(other), tmp_path / "a")


def test_wrong_variant_class(file: Path, blocks: Make, refused: Refused) -> None:
    """load(variant=) with a class of another name says which the file asks for."""
    model = blocks()
    with refused(model, ll.AdapterFileError, ("'lora'", "'antipasto'"), path=str(file)):
        ll.load(model, file, variant=AntiPaSTO)


@pytest.mark.parametrize("where", ["missing/adapter", "directory", "file/adapter", "", "x" * 300])
def test_path_that_cannot_be_written(
    blocks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A missing folder, a folder or a file in the way, no name, too long a name: an error.

    Nothing is left behind, and nothing that was there is changed.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    adapter = ll.attach(blocks(), "lora", r=2)
    for save in (adapter.save, lambda path: ll.save(adapter._root, path)):
        with pytest.raises(ll.AdapterFileError) as caught:
            save(where)
        assert caught.value.path == where
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_existing_file_survives_a_failed_write(
    file: Path, blocks: Make, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A write that fails half-way (a full disk, say) leaves the old file, and no temporary one."""
    before = file.read_bytes()
    adapter = ll.attach(blocks(), "lora", r=4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(ll.AdapterFileError, match="No space left on device") as caught:
        adapter.save(file)
    assert caught.value.path == str(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_nothing_to_save_or_detach(blocks: Make, refused: Refused, tmp_path: Path) -> None:
    """Functions that need an adapter say which there are."""
    model = blocks()
    for function in (ll.detach, lambda m: ll.save(m, tmp_path / "a")):
        with refused(model, ll.AdapterError, ("0 adapters", "none")):
            function(model)
    one = ll.attach(model, "lora", r=2, name="one")
    ll.attach(model, "lora", r=2, name="two")
    with refused(model, ll.AdapterError, ("2 adapters", "one, two", "name=")):
        ll.detach(model)
    with refused(model, ll.AdapterError, ("'three'", "one, two"), adapter="three"):
        ll.detach(model, "three")
    one.detach()
    for use in (
        one.detach,
        one.state_dict,
        one.penalty,
        lambda: setattr(one, "scale", 2),
        lambda: one.save(tmp_path / "a"),
    ):
        with refused(model, ll.AdapterError, ("detached",), adapter="one"):
            use()
    assert "detached" in repr(one)
