"""Files and state dicts: what is saved is all there is."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.author import Variant
from lora_lite.testing.case import Case, move
from lora_lite.testing.compare import all_close, all_same, close, differs, same
from lora_lite.testing.promise import promise


@promise(examples=10, sizes=True, waivable=False)
def save_and_load_are_bitwise(case: Case) -> None:
    """A trained adapter that is saved, and loaded onto a fresh copy of the base, gives the same
    tensors and outputs to the bit: whatever the random state, without initialisation, calibration
    data or the instance that was attached.

    Usually broken by a number that lives on the Python object instead of in a tensor, by a tensor
    that `state_dict` forgets, or by one that is drawn or computed again on loading.
    """
    torch.manual_seed(1)
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    with torch.no_grad():
        expected = model(x)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        adapter.save(file)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        fresh = case.model()
        again = ll.load(fresh, file, variant=type(case.variant))
    same(torch.get_rng_state(), before, "the global random state after load")
    fields, saved = (
        {path: variant.model_dump_json() for path, variant in a.sites.items()}
        for a in (again, adapter)
    )
    assert fields == saved, f"the fields of the sites: {fields}, saved: {saved}"
    all_same(again.state_dict(), adapter.state_dict(), "the loaded tensors")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags, (
        "requires_grad differs after load"
    )
    with torch.no_grad():
        same(fresh(x), expected, "the output after loading")


@promise(examples=1, shrink=False, waivable=False)
def another_process_agrees(case: Case) -> None:
    """A new Python process, which knows nothing but the file and the variant's class, computes the
    same bits; and an adapter that is attached there, with the same seed, starts from the same
    values up to rounding.

    Usually broken by state in a module or class, by hash(), id() or the order of a set, by a class
    that cannot be imported (one defined in a function), or by dtype and device that are fixed at
    import.
    """
    case = case.but(kind="Linear")
    case.attach(case.but(seed=case.seed + 1).model())  # the other process has not seen this one
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.attach(model)
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    move(adapter, 0.1, case.seed)
    with TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter.safetensors")
        (Path(folder) / "case.pickle").write_bytes(pickle.dumps(case))
        found = _in_another_process(Path(folder), type(case.variant))
    with torch.no_grad():
        same(found["output"], model(x), "the output of another process")
    all_close(found["start"], start, "start values in another process")


@promise(examples=8)
def file_without_derived_tensors_is_close(case: Case) -> None:
    """A file that leaves out the tensors that `derive` gives again loads to the same output up to
    rounding; if a variant has none for these fields, saving one is refused.

    Usually broken by a `derived` tensor that is not a function of the base alone, or that training
    or `project` changes.
    """
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    small = adapter.state_dict(derived=False)
    full = adapter.state_dict()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        if small.keys() == full.keys():
            try:
                adapter.save(file, derived=False)
            except ll.AdapterFileError:
                return
            raise AssertionError("derived=False left nothing out, and was not refused")
        adapter.save(file, derived=False)
        fresh = case.model()
        ll.load(fresh, file, variant=type(case.variant))
    with torch.no_grad():
        close(fresh(x), model(x), "the output after loading a file without derived tensors")


@promise(examples=8, sizes=True)
def state_dicts_round_trip(case: Case) -> None:
    """An adapter's `state_dict`, copied into an adapter with another seed, makes it the same to the
    bit; so does the whole model's. A state dict with a tensor missing is refused.

    Usually broken by `load_state_dict` that is not the inverse of `state_dict`, or by state outside
    the tensors.
    """
    model, x = case.model(), case.inputs(2, 3)
    adapter = case.trained(model)
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    other = case.model()
    copy = case.attach(other, seed=case.seed + 1)
    move(copy, 0.2, 3)
    if copy.sites != adapter.sites:
        return
    with torch.no_grad():
        expected = model(x)
        differs(other(x), expected, "an adapter with another seed")
        copy.load_state_dict(state)
        all_same(copy.state_dict(), state, "the tensors after load_state_dict")
        same(other(x), expected, "the output after load_state_dict")
        move(copy, 0.2, 4)
        other.load_state_dict(model.state_dict())
        same(other(x), expected, "the output after the model's load_state_dict")
    missing = dict(list(state.items())[1:])
    try:
        copy.load_state_dict(missing)
    except ll.AdapterFileError:
        return
    raise AssertionError(f"a state dict without {next(iter(state))} was accepted")


@promise(examples=6)
def upgrade_keeps_the_fields(case: Case) -> None:
    """`upgrade` passes on every field that it is given and that still exists, unless the value is
    the default.

    An old file whose field is dropped loads with the default, and computes something else without a
    word. Usually broken by an `upgrade` that lists the fields it knows instead of changing those
    that changed: write `{**fields, ...}`. What an `upgrade` refuses is not asked.
    """
    cls, variant = type(case.variant), case.variant
    if cls.upgrade.__func__ is Variant.upgrade.__func__:  # type: ignore[attr-defined]
        return
    given = variant.model_dump(mode="json")
    for older in range(1, cls.format):
        try:
            fields, _ = cls.upgrade(dict(given), _Tensors(), older)
        except (KeyError, ValueError, TypeError, AttributeError, ll.LoraLiteError):
            continue
        for name, value in given.items():
            is_default = getattr(variant, name) == cls.model_fields[name].default
            assert name in fields or is_default, (
                f"upgrade from format {older} drops {name}={value!r}: of {given} it makes {fields}"
            )


class _Tensors(dict[str, Tensor]):
    """The tensors of an older file, whatever their names were."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(1)


def _in_another_process(folder: Path, cls: type[Variant]) -> dict[str, Any]:
    """What `lora_lite.testing.child` finds in this folder."""
    assert "<locals>" not in cls.__qualname__, (
        f"{cls.__qualname__} is defined inside a function; define it in a module"
    )
    file = getattr(sys.modules[cls.__module__], "__file__", None) or ""
    hash_seed = "8" if os.environ.get("PYTHONHASHSEED") == "7" else "7"
    done = subprocess.run(
        [sys.executable, "-m", "lora_lite.testing.child", str(folder), cls.__module__, file],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONHASHSEED": hash_seed,
        },
    )
    assert done.returncode == 0, f"the other process failed:\n{done.stderr}"
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found
