"""Bad input: each case has a clear error, and leaves the model bit for bit as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_antipasto import AntiPaSTO
from lora_lite_lora import LoRA
from safetensors.torch import save_file
from torch import Tensor, nn

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Make = Callable[..., nn.Module]


# --- attach and plan


@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("no_such_method", r"there is no variant 'no_such_method' \(installed: .*antipasto.*lora"),
        ("antipato", r"there is no variant 'antipato'; did you mean 'antipasto'"),
        ("lroa", r"there is no variant 'lroa'; did you mean .*'lora'"),
        ("LoRA", r"there is no variant 'LoRA'"),
        ("", r"there is no variant ''"),
        ("x; rm -rf /", r"there is no variant 'x; rm -rf /' \("),
    ],
)
def test_unknown_variant(blocks: Make, untouched: Untouched, variant: str, complaint: str) -> None:
    """A name that nothing provides is said to be unknown, with near names, and never turned into a pip command."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with untouched(model), pytest.raises(ll.UnknownVariantError, match=complaint) as caught:
            function(model, variant)
        assert "pip install" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"rr": 4},
            r"variant 'lora': there is no field 'rr'; did you mean 'r'\? \(its fields are r, alpha, rslora, dropout\)",
        ),
        ({"dropuot": 0.1}, r"there is no field 'dropuot'; did you mean 'dropout'"),
        ({"r": 0}, r"variant 'lora': r=0: .*greater than 0"),
        ({"r": 4.0, "alfa": 1.0}, r"r=4\.0.*there is no field 'alfa'; did you mean 'alpha'"),
        ({"target": "up"}, r"there is no field 'target'"),
    ],
)
def test_unknown_or_invalid_field(
    blocks: Make, untouched: Untouched, fields: dict[str, Any], complaint: str
) -> None:
    """The error names variant, field, value and near field, all complaints in one message."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with untouched(model), pytest.raises(ll.FieldError, match=complaint):
            function(model, "lora", **fields)


@pytest.mark.parametrize(
    ("variant", "fields", "complaint"),
    [
        (LoRA(), {"r": 4}, "already made: put r into it"),
        (LoRA, {}, "a variant is a name or an instance"),
        (None, {}, "a variant is a name or an instance"),
    ],
)
def test_neither_name_nor_instance(
    blocks: Make, untouched: Untouched, variant: Any, fields: Any, complaint: str
) -> None:
    """Fields beside an instance, a class for an instance, or nothing of both: said in words."""
    model = blocks()
    with untouched(model), pytest.raises(ll.FieldError, match=complaint):
        ll.attach(model, variant, **fields)


def test_rank_larger_than_the_layer(blocks: Make, untouched: Untouched) -> None:
    """All sites that do not fit are listed together, each with its shape and the largest possible rank."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with untouched(model), pytest.raises(ll.MisfitError) as caught:
            function(model, "lora", r=9)
        told = str(caught.value)
        assert "does not fit 4 of 4 sites" in told
        assert (
            "blocks.0.up (8 -> 12): lora: r: 9 is larger than this layer allows; the largest possible is 8"
            in told
        )
        assert "blocks.1.down (12 -> 8)" in told


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (
            r"upp$",
            r"targets: 'upp\$' matches no linear layer; did you mean 'up'\?\nThe linear layers to choose from:",
        ),
        (
            [r"up$", r"nothing"],
            r"targets: 'nothing' matches no linear layer\n(?s:.*)up x 2\n  down x 2\n  lm_head x 1",
        ),
        (r"up$|(", r"targets=.*not a regular expression"),
        ((), r"targets=\(\) chooses no layer"),
        ([3], r"targets=\[3\]: not a regular expression"),
        (
            r"lm_head",
            r"exclude \(by default the output head\) takes away all.*exclude=\(\).*:\n  lm_head",
        ),
        ([r"up$", r"lm_head"], r"takes away all that a pattern of targets= matches.*:\n  lm_head"),
    ],
)
def test_pattern_without_match(
    blocks: Make, untouched: Untouched, targets: Any, complaint: str
) -> None:
    """A pattern that chooses nothing is an error, also beside one that does; near names and the model's layers are shown."""
    model = blocks()
    for function in (ll.attach, ll.plan):
        with untouched(model), pytest.raises(ll.TargetError, match=complaint):
            function(model, "lora", targets=targets)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"layers": 2}, r"layers=\[2\]: the model has repeated blocks 0 to 1"),
        ({"layers": [0, -1]}, r"layers=\[-1, 0\]: the model has repeated blocks 0 to 1"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": 0, "targets": "stem"}, r"0 of the chosen layers lie in those"),
        ({"exclude": "upp"}, r"exclude: 'upp' matches no linear layer; did you mean 'up'"),
        ({"overrides": {"stem": {"r": 2}}}, r"overrides: 'stem' matches no linear layer"),
        ({"overrides": {"(": {"r": 2}}}, r"overrides='\(': not a regular expression"),
    ],
)
def test_bad_choice_of_layers(
    blocks: Make, untouched: Untouched, arguments: dict[str, Any], complaint: str
) -> None:
    """Indices out of range, exclusions and overrides that match nothing: each says what there is."""
    model = blocks()
    with untouched(model), pytest.raises(ll.TargetError, match=complaint):
        ll.attach(model, "lora", **arguments)


def test_bad_override_field(blocks: Make, untouched: Untouched) -> None:
    """A misspelt field in overrides is an error like any other."""
    model = blocks()
    with untouched(model), pytest.raises(ll.FieldError, match="'lora': there is no field 'rank'"):
        ll.attach(model, "lora", overrides={"up": {"rank": 2}})


@pytest.mark.parametrize("name", ["", "my adapter", "a.b", "1st", "a/b"])
def test_bad_adapter_name(blocks: Make, untouched: Untouched, name: str) -> None:
    """An adapter's name becomes part of attribute names: what cannot is refused."""
    model = blocks()
    with (
        untouched(model),
        pytest.raises(ll.AdapterError, match=rf"name={re.escape(repr(name))}: .*letters"),
    ):
        ll.attach(model, "lora", r=2, name=name)


def test_name_in_use(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """A second adapter of the same name is refused, by attach and load, and the first goes on working."""
    model = blocks()
    ll.attach(model, "lora", r=2, name="a").save(tmp_path / "a.safetensors")
    with (
        untouched(model),
        pytest.raises(ll.AdapterError, match=r"'a' is attached already.*in use: a\)"),
    ):
        ll.attach(model, "lora", r=2, name="a")
    with untouched(model), pytest.raises(ll.AdapterError, match=r"'a' is attached already"):
        ll.load(model, tmp_path / "a.safetensors", name="a")
    model.blocks[0].up.lora_b_A = 3  # something of the user's own
    with (
        untouched(model),
        pytest.raises(ll.AdapterError, match=r"blocks\.0\.up has an attribute 'lora_b_A' already"),
    ):
        ll.attach(model, "lora", r=2, name="b")


def test_models_that_cannot_carry_an_adapter(blocks: Make, untouched: Untouched) -> None:
    """Not a module, no linear layer, no repeated block, weights on the meta device, an integer dtype: each is said."""
    with pytest.raises(ll.AdapterError, match=r"expected a torch\.nn\.Module, got dict"):
        ll.attach({}, "lora")  # type: ignore[arg-type]
    with pytest.raises(ll.TargetError, match="ReLU has no linear layer"):
        ll.attach(nn.ReLU(), "lora")
    with pytest.raises(
        ll.TargetError,
        match=r"no repeated blocks .*give targets=\. The linear layers to choose from:\n  0 x 1",
    ):
        ll.attach(nn.Sequential(nn.Linear(3, 3)), "lora")
    with torch.device("meta"):
        empty = blocks()
    with pytest.raises(ll.AdapterError, match=r"blocks\.0\.up is on the meta device"):
        ll.attach(empty, "lora", r=2)
    assert not any("lora" in key for key in empty.state_dict())
    model = blocks()
    with (
        untouched(model),
        pytest.raises(ll.AdapterError, match=r"dtype=torch\.int8: .* floating-point"),
    ):
        ll.attach(model, "lora", r=2, dtype=torch.int8)


# --- calibration


@pytest.mark.parametrize(
    ("fields", "calibration", "complaint"),
    [
        (
            {},
            [torch.randn(4, 8)],
            r"antipasto needs no calibration data with these fields; leave calibration= out",
        ),
        ({"select": "activation"}, None, r"needs calibration data: give calibration="),
        ({"select": "activation"}, [], r"calibration= is empty"),
        (
            {"select": "activation"},
            [torch.randn(9, 8), torch.randn(9, 5)],
            r"rejects calibration batch 1 \(float32\[9, 5\]\)",
        ),
        (
            {"select": "activation"},
            [{"y": torch.randn(2, 3)}],
            r"batch 0 \(y: float32\[2, 3\]\): TypeError: .*'y'",
        ),
        (
            {"select": "activation"},
            {"x": torch.randn(9, 8)},
            r"expected an iterable of model inputs.*; of one batch, \[batch\]",
        ),
        (
            {"select": "activation"},
            torch.randn(9, 8),
            r"expected an iterable of model inputs.*; of one batch, \[batch\]",
        ),
        ({"select": "activation"}, 3, r"calibration= is int: expected an iterable of model inputs"),
    ],
)
def test_bad_calibration(
    blocks: Make, untouched: Untouched, fields: Any, calibration: Any, complaint: str
) -> None:
    """Missing, superfluous, empty, rejected by the model, or one batch where several are asked for."""
    model = blocks()
    with untouched(model), pytest.raises(ll.CalibrationError, match=complaint):
        ll.attach(model, AntiPaSTO(r=4, **fields), calibration=calibration)


def test_site_never_called_in_calibration(untouched: Untouched) -> None:
    """A layer that the data never reaches has no statistics: it is named."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers[0](x)
            return out

    model = Skipping()
    with (
        untouched(model),
        pytest.raises(ll.CalibrationError, match=r"never called during calibration:\n  layers\.1"),
    ):
        ll.attach(model, AntiPaSTO(r=4, select="activation"), calibration=[torch.randn(9, 8)])


# --- an exception in the middle


class Failing(ll.Variant, name="failing"):
    """Fails at the layer whose shapes are 12 -> 8."""

    stage: str

    def _fail(self, site: ll.Site, stage: str) -> None:
        if self.stage == stage and site.d_in == 12:
            raise ZeroDivisionError(stage)

    def tensors(self, site: ll.Site) -> dict[str, ll.TensorSpec]:
        self._fail(site, "tensors")
        return {"A": ll.TensorSpec((site.d_out,))}

    def derive(self, site: ll.Site) -> dict[str, Tensor]:
        self._fail(site, "derive")
        return {}

    def init(
        self, site: ll.Site, derived: ll.Tensors, statistics: ll.Tensors, rng: ll.Rng
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

    def delta_output(self, site: ll.Site, t: ll.Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["A"] * y


@pytest.mark.parametrize("stage", ["tensors", "derive", "init"])
def test_exception_in_a_variant(blocks: Make, untouched: Untouched, stage: str) -> None:
    """A variant that raises at its second site leaves no trace at the first."""
    model = blocks()
    with untouched(model), pytest.raises(ZeroDivisionError, match=stage):
        ll.attach(model, Failing(stage=stage))


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ("missing", r"A: missing, expected \[8\]"),
        ("extra", r"B: extra, not declared \(declared: A\)"),
        ("shape", r"A: shape \[3\], expected \[8\]"),
        ("kind", r"A: dtype torch\.int64, expected a floating-point dtype"),
        ("nan", r"A: has values that are not finite"),
    ],
)
def test_variant_that_breaks_its_word(
    blocks: Make, untouched: Untouched, stage: str, complaint: str
) -> None:
    """Start values other than declared are named with the variant, the layer and what was declared."""
    model = blocks()
    with (
        untouched(model),
        pytest.raises(
            ll.VariantContractError,
            match=rf"'failing' at blocks\.0\.down does not give.*\n  {complaint}",
        ),
    ):
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


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change a file's tensors and metadata."""
    with safetensors.safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["lora_lite"])
    change(tensors, header)
    save_file(tensors, path, {"lora_lite": json.dumps(header)})


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
    h["variant_format"] = 7


def _not_installed(_: Any, h: dict[str, Any]) -> None:
    h.update(variant="dreamt_up", provider="lora-lite-dreams 1.2")


def _bad_field(_: Any, h: dict[str, Any]) -> None:
    h["sites"]["blocks.0.up"] = '{"r": 2, "ranks": 3}'


def _rank_too_large(_: Any, h: dict[str, Any]) -> None:
    h["sites"]["blocks.0.up"] = '{"r": 200}'


def _no_such_site(_: Any, h: dict[str, Any]) -> None:
    h["sites"]["blocks.0.upp"] = h["sites"].pop("blocks.0.up")


def _no_site(_: Any, h: dict[str, Any]) -> None:
    h["sites"] = {}


def _damaged(_: Any, h: dict[str, Any]) -> None:
    h["sites"] = 3


FILES = [
    (
        _nan,
        ll.AdapterFileError,
        r"1 tensors do not fit.*\n  blocks\.1\.up\.A: has values that are not finite",
    ),
    (_inf, ll.AdapterFileError, r"blocks\.1\.up\.B: has values that are not finite"),
    (_missing, ll.AdapterFileError, r"blocks\.0\.down\.B: missing, expected \[8, 2\]"),
    (_extra, ll.AdapterFileError, r"blocks\.0\.down\.C: extra"),
    (_extra_site, ll.AdapterFileError, r"elsewhere\.A: extra \(no such site\)"),
    (_reshaped, ll.AdapterFileError, r"blocks\.0\.up\.A: shape \[8, 2\], expected \[2, 8\]"),
    (_renamed, ll.AdapterFileError, r"(?s)blocks\.0\.up\.A: missing.*blocks\.0\.up\.a: extra"),
    (
        _retyped,
        ll.AdapterFileError,
        r"blocks\.0\.up\.A: dtype torch\.float16, expected as saved: A float32",
    ),
    (_integers, ll.AdapterFileError, r"blocks\.0\.up\.A: dtype torch\.int64"),
    (
        _newer,
        ll.AdapterFileError,
        r"file format 99, written by lora-lite-core 9\.9; this one reads up to 1\. pip install --upg",
    ),
    (_newer_variant, ll.AdapterFileError, r"format 7 of variant 'lora'.*reads up to 1"),
    (_not_installed, ll.UnknownVariantError, r"there is no variant 'dreamt_up'"),
    (_bad_field, ll.AdapterFileError, r"variant 'lora' refuses"),
    (_rank_too_large, ll.MisfitError, r"200 is larger than this layer allows"),
    (
        _no_such_site,
        ll.AdapterFileError,
        r"1 of which Blocks does not have.*\n  blocks\.0\.upp; did you mean 'blocks\.0\.up'",
    ),
    (_no_site, ll.AdapterFileError, r"damaged metadata: (?s:.*)sites(?s:.*)at least 1 item"),
    (_damaged, ll.AdapterFileError, r"damaged metadata"),
]


@pytest.mark.parametrize(
    ("change", "error", "complaint"), FILES, ids=[case[0].__name__.strip("_") for case in FILES]
)
def test_file_that_does_not_fit(
    file: Path,
    blocks: Make,
    untouched: Untouched,
    change: Any,
    error: type[Exception],
    complaint: str,
) -> None:
    """Whatever is wrong with a file is named, and nothing is attached."""
    rewrite(file, change)
    model = blocks()
    with untouched(model), pytest.raises(error, match=complaint):
        ll.load(model, file)


def test_everything_wrong_is_listed_at_once(file: Path, blocks: Make, untouched: Untouched) -> None:
    """Four different faults, one message."""
    for change in (_nan, _missing, _extra_site, _reshaped, _retyped):
        rewrite(file, change)
    with untouched(model := blocks()), pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, file)
    for fault in ("not finite", "missing", "no such site", "shape", "float16"):
        assert fault in str(caught.value)


def test_retyped_frozen_tensor(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """A frozen tensor in another dtype than it was saved in is noticed like a trainable one."""
    ll.attach(blocks(), AntiPaSTO(r=4)).save(tmp_path / "a.safetensors")

    def change(t: dict[str, Tensor], _: Any) -> None:
        t["blocks.0.up.S"] = t["blocks.0.up.S"].double()
        t["blocks.0.up.U"] = t["blocks.0.up.U"].half()

    rewrite(tmp_path / "a.safetensors", change)
    with (
        untouched(model := blocks()),
        pytest.raises(ll.AdapterFileError, match=r"(?s)up\.S: dtype torch\.float64.*|up\.U: dtype"),
    ):
        ll.load(model, tmp_path / "a.safetensors")


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
    with pytest.raises(ll.AdapterFileError, match="cannot be read as safetensors"):
        ll.load(model, folder / "part")
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_change_of_the_metadata_is_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in the metadata: the file loads, or an error of lora-lite says why not and nothing is attached."""
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
    except UserWarning:
        pass  # warnings are errors here: the fingerprint differs


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", b"\x00" * 100])
def test_something_else_than_an_adapter(
    blocks: Make, untouched: Untouched, tmp_path: Path, content: bytes
) -> None:
    """Text, a pickle, zeros, a missing file, a directory, the weights of a model: not an adapter, and nothing is executed."""
    (tmp_path / "file").write_bytes(content)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    model = blocks()
    for name in ("file", "no_such_file", "."):
        with (
            untouched(model),
            pytest.raises(ll.AdapterFileError, match="cannot be read as safetensors"),
        ):
            ll.load(model, tmp_path / name)
    with untouched(model), pytest.raises(ll.AdapterFileError, match="not an adapter of lora-lite"):
        ll.load(model, tmp_path / "weights")


def test_another_base(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """Other base weights: an error where tensors were computed from them, a warning else, silence with check_base=False."""
    ll.attach(blocks(), AntiPaSTO(r=4), name="a").save(tmp_path / "antipasto")
    ll.attach(blocks(), LoRA(r=2)).save(tmp_path / "lora")
    other = blocks()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    with (
        untouched(other),
        pytest.raises(ll.BaseMismatchError, match=r"4 of 4 sites differ.*\n  blocks\.0\.up"),
    ):
        ll.load(other, tmp_path / "antipasto")
    with pytest.warns(UserWarning, match=r"base with other weights: 4 of 4 sites"):
        ll.load(other, tmp_path / "lora").detach()
    ll.load(other, tmp_path / "lora", check_base=False).detach()
    ll.load(other, tmp_path / "antipasto", check_base=False).detach()


def test_the_same_base_in_another_precision_is_the_same(blocks: Make, tmp_path: Path) -> None:
    """float32, bfloat16 and float16 copies of one base take one another's files without a word."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ll.attach(blocks().bfloat16().to(dtype), AntiPaSTO(r=4)).save(tmp_path / "a")
        for other in (torch.float32, torch.bfloat16, torch.float16):
            ll.load(blocks().bfloat16().to(other), tmp_path / "a")


def test_wrong_variant_class(file: Path, blocks: Make, untouched: Untouched) -> None:
    """load(variant=) with a class of another name says so."""
    with (
        untouched(model := blocks()),
        pytest.raises(
            ll.AdapterFileError, match=r"holds a 'lora' adapter.*AntiPaSTO is 'antipasto'"
        ),
    ):
        ll.load(model, file, variant=AntiPaSTO)


@pytest.mark.parametrize("where", ["missing/adapter", "directory", "file/adapter", "", "x" * 300])
def test_path_that_cannot_be_written(
    blocks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A missing directory, a directory or a file in the way, no name, too long a name: an error, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    adapter = ll.attach(blocks(), "lora", r=2)
    for save in (adapter.save, lambda path: ll.save(adapter._root, path)):
        with pytest.raises(ll.AdapterFileError, match="cannot be written"):
            save(where)
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
    with pytest.raises(ll.AdapterFileError, match="No space left on device"):
        adapter.save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_nothing_to_save_or_detach(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """Functions that need an adapter say which there are."""
    model = blocks()
    with untouched(model):
        for function in (ll.detach, lambda m: ll.save(m, tmp_path / "a")):
            with pytest.raises(ll.AdapterError, match=r"no single adapter to choose; .* \(none\)"):
                function(model)
    one = ll.attach(model, "lora", r=2, name="one")
    ll.attach(model, "lora", r=2, name="two")
    with pytest.raises(
        ll.AdapterError,
        match=r"no single adapter to choose; give the name= of one that it has \(one, two\)",
    ):
        ll.detach(model)
    with pytest.raises(ll.AdapterError, match=r"no adapter named 'three'; .*\(one, two\)"):
        ll.detach(model, "three")
    one.detach()
    for use in (
        one.detach,
        one.state_dict,
        one.penalty,
        lambda: setattr(one, "scale", 2),
        lambda: one.save(tmp_path / "a"),
    ):
        with pytest.raises(ll.AdapterError, match=r"'one' .* is detached"):
            use()
    assert "detached" in repr(one)
