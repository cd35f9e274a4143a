"""Files of format 1, which the first core wrote, load as they were: `files/format_1/make.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import fileformat
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "files" / "format_1"
# Methods whose tensors have changed since: their own `upgrade` refuses full files of format 1.
CHANGED = ("antipasto", "lora_xs", "lora_xs_slim")
CASES = sorted(
    path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in ("expected", *CHANGED)
)


def maker() -> ModuleType:
    """The module that wrote the files, for its base and its inputs."""
    spec = importlib.util.spec_from_file_location("format_1_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """The adapter's state when it was saved, and what the model gave with it."""
    stored = load_file(FOLDER / "expected.safetensors")
    theirs = {
        key.removeprefix(f"{case}/"): tensor
        for key, tensor in stored.items()
        if key.startswith(f"{case}/")
    }
    output = theirs.pop("output")
    return theirs, output


def load(case: str) -> tuple[ll.Adapter, Tensor]:
    """The adapter of a file, loaded with the note that it has no digest; and what it computes."""
    here = maker()
    model = here.base()
    with pytest.warns(ll.AdapterWarning, match="format 1"):
        adapter = ll.load(model, FOLDER / f"{case}.safetensors")
    return adapter, model(here.inputs())


def test_every_case_has_its_file() -> None:
    """No case of the script is without a file, and none was forgotten here."""
    assert sorted(maker().CASES) == sorted([*CASES, *CHANGED])


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_format_1_loads_bit_for_bit(case: str) -> None:
    """Tensors, seed and scale are those that were saved, and the model computes the same."""
    adapter, output = load(case)
    tensors, before = expected(case)
    state = adapter.state_dict()
    assert state.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(state[key], value), key
        assert state[key].dtype == value.dtype, key
    torch.testing.assert_close(output, before)
    assert (adapter.scale, adapter.seed) == (0.75, 7 if case == "lora" else 0)
    assert adapter.variant.name == maker().CASES[case][0]


@pytest.mark.parametrize("case", CHANGED)
def test_methods_that_have_changed_say_what_to_do(case: str, untouched: Any) -> None:
    """A file that the method can no longer read is refused with the way out, not misread."""
    model = maker().base()
    with (
        untouched(model),
        pytest.warns(ll.AdapterWarning, match="format 1"),
        pytest.raises(ll.AdapterFileError, match="format 1") as caught,
    ):
        ll.load(model, FOLDER / f"{case}.safetensors")
    assert caught.value.fix


def test_fields_of_each_layer_come_along() -> None:
    """Format 1 kept the fields at each layer; layers with the same fields share a configuration."""
    adapter, _ = load("lora")
    assert {path: variant.r for path, variant in adapter.sites.items()} == {  # type: ignore[attr-defined]
        "blocks.0.up": 3,
        "blocks.0.down": 2,
        "blocks.1.up": 3,
        "blocks.1.down": 2,
    }
    assert {variant.alpha for variant in adapter.sites.values()} == {3.0}  # type: ignore[attr-defined]


def test_saved_again_it_is_of_todays_format(tmp_path: Path) -> None:
    """The note says to save the adapter again: then there is a digest, and nothing is said."""
    adapter, output = load("lora")
    adapter.save(tmp_path / "again")
    assert fileformat.read(tmp_path / "again")[0].format == fileformat.FORMAT
    here = maker()
    ll.load(model := here.base(), tmp_path / "again")
    assert torch.equal(model(here.inputs()), output)
