"""Damaged and hostile files: every one an AdapterFileError at the first moment, or the same
adapter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import safetensors
import torch
from lora_lite import fileformat
from safetensors.torch import save_file
from torch import Tensor, nn

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
SECONDS = 5.0  # for any one file, on a busy machine


def model() -> nn.Module:
    """The base: two layers."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])


def trained(variant: str = "lora", **fields: Any) -> ll.Adapter:
    """An adapter whose every number is another one."""
    adapter = ll.attach(model(), variant, targets=".", **{"r": 4, **fields})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return adapter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A whole file."""
    trained().save(tmp_path / "whole")
    return tmp_path / "whole"


def is_same(adapter: ll.Adapter, expected: ll.Adapter) -> bool:
    """Whether two adapters are one: fields, scale and every bit of every tensor."""
    mine, other = adapter.state_dict(), expected.state_dict()
    return (
        adapter.sites == expected.sites
        and adapter.scale == expected.scale
        and mine.keys() == other.keys()
        and all(torch.equal(value, other[name]) for name, value in mine.items())
    )


class TooLongError(Exception):
    """An error's text, or the time it took to come, had no bound."""


def judged(path: Path, expected: ll.Adapter, base: nn.Module) -> str:
    """What load makes of a file, in a word; all but the two right answers are errors."""
    start = time.monotonic()
    try:
        adapter = ll.load(base, path)
    except ll.AdapterFileError as error:
        outcome = "refused"
        if len(str(error)) > 5_000:
            raise TooLongError(f"{len(str(error))} characters, which nobody reads") from error
    else:
        assert is_same(adapter, expected), "a damaged file was loaded as another adapter"
        adapter.detach()
        outcome = "same"
    if time.monotonic() - start > SECONDS:
        raise TooLongError(f"{time.monotonic() - start:.0f} seconds")
    return outcome


# --- a fuzzer of damage


def flip(data: bytearray, rng: random.Random) -> None:
    """One bit."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data)) :]


def zero_page(data: bytearray, rng: random.Random) -> None:
    """A part is zero, as after a crash of the file system."""
    size = rng.choice((16, 128, 512))
    start = rng.randrange(0, len(data), size)
    data[start : start + size] = bytes(len(data[start : start + size]))


def swap(data: bytearray, rng: random.Random) -> None:
    """Two bytes have changed places."""
    i, j = rng.randrange(len(data)), rng.randrange(len(data))
    data[i], data[j] = data[j], data[i]


def swap_words(data: bytearray, rng: random.Random) -> None:
    """Two aligned words of four bytes have changed places: two numbers of a tensor, say."""
    i, j = (4 * rng.randrange(len(data) // 4) for _ in range(2))
    data[i : i + 4], data[j : j + 4] = data[j : j + 4], data[i : i + 4]


def insert(data: bytearray, rng: random.Random) -> None:
    """A few bytes too many."""
    place = rng.randrange(len(data))
    data[place:place] = rng.randbytes(rng.randrange(1, 9))


def remove(data: bytearray, rng: random.Random) -> None:
    """A few bytes too few."""
    place = rng.randrange(len(data))
    del data[place : place + rng.randrange(1, 9)]


def overwrite(data: bytearray, rng: random.Random) -> None:
    """Noise."""
    place, size = rng.randrange(len(data)), rng.randrange(1, 65)
    data[place : place + size] = rng.randbytes(len(data[place : place + size]))


def append(data: bytearray, rng: random.Random) -> None:
    """Something behind the end."""
    data += rng.randbytes(rng.randrange(1, 65))


def change_header(data: bytearray, rng: random.Random) -> None:
    """The header is valid JSON still, with one of its values exchanged."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    junk: list[Any] = [None, True, -1, 2**70, 0.5, "", "x" * 99, [], {}, [[]], {"a": {}}]
    holder, key = rng.choice(list(_places(header)))
    holder[key] = rng.choice(junk)
    text = json.dumps(header).encode()
    data[: 8 + size] = struct.pack("<Q", len(text)) + text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


DAMAGE = (
    flip, truncate, zero_page, swap, swap_words, insert, remove, overwrite, append, change_header,
)  # fmt: skip


def fuzz(folder: Path, number: int, untouched: Untouched) -> dict[str, int]:
    """How often each outcome came; the base is untouched by all of it."""
    whole = {}
    for name, adapter in (("lora", trained()), ("antipasto", trained("antipasto"))):
        adapter.save(folder / name)
        whole[name] = (adapter, (folder / name).read_bytes())
    rng, outcomes, base = random.Random(0), {"refused": 0, "same": 0}, model()
    with untouched(base):
        for index in range(number):
            damage = DAMAGE[index % len(DAMAGE)]
            adapter, content = whole[rng.choice(sorted(whole))]
            data = bytearray(content)
            damage(data, rng)
            (folder / "damaged").write_bytes(data)
            try:
                outcome = judged(folder / "damaged", adapter, base)
            except BaseException as error:
                raise AssertionError(f"file {index}, {damage.__name__}: {error!r}") from error
            assert outcome == "refused" or data == content or damage is change_header, (
                f"file {index}, {damage.__name__}, loaded without a word"
            )
            outcomes[outcome] += 1
    return outcomes


def test_damaged_files(tmp_path: Path, untouched: Untouched) -> None:
    """Promise: whatever happened to a file's bytes, it is an AdapterFileError at once, or it is the
    identical adapter; the model is untouched."""
    outcomes = fuzz(tmp_path, 300, untouched)
    assert outcomes["refused"] > 250


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path, untouched: Untouched) -> None:
    """Promise: as above, for 10,000 files."""
    outcomes = fuzz(tmp_path, 10_000, untouched)
    assert outcomes["refused"] > 9_000


def bits_that_pass(folder: Path, untouched: Untouched, number: int | None) -> list[int]:
    """The bits of a small file that can be flipped without an error, of some or of all."""
    base = nn.ModuleList([nn.Linear(2, 2)])
    adapter = ll.attach(base, "lora", targets=".", r=1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(0.5)
    adapter.save(path := folder / "a")
    adapter.detach()
    content = path.read_bytes()
    bits: Any = range(8 * len(content))
    passed = []
    with untouched(base):
        for bit in bits if number is None else random.Random(0).sample(bits, number):
            data = bytearray(content)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                ll.load(base, path)
            except ll.AdapterFileError:
                continue
            passed.append(bit)
            ll.detach(base)
    return passed


def test_single_bits_count(tmp_path: Path, untouched: Untouched) -> None:
    """Promise: a flipped bit is detected, wherever it is: in the length of the header, in the
    header, in padding, in a tensor.
    """
    assert bits_that_pass(tmp_path, untouched, 800) == []


@pytest.mark.slow
def test_every_single_bit_counts(tmp_path: Path, untouched: Untouched) -> None:
    """Promise: as above, for each bit of a file."""
    assert bits_that_pass(tmp_path, untouched, None) == []


def test_exchanged_tensors_are_detected(file: Path, untouched: Untouched) -> None:
    """Promise: the digest covers which tensor is which, not only the numbers."""
    with safetensors.safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    same_shape = [(a, b) for a in tensors for b in tensors if a < b]
    a, b = next(
        (a, b)
        for a, b in same_shape
        if tensors[a].shape == tensors[b].shape or tensors[a].shape == tensors[b].T.shape
    )
    if tensors[a].shape == tensors[b].shape:
        tensors[a], tensors[b] = tensors[b], tensors[a]
    else:
        tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()
    save_file(tensors, file, metadata)
    with untouched(base := model()), pytest.raises(ll.AdapterFileError, match=r"damaged|digest"):
        ll.load(base, file)


# --- files that are whole, and lie


def rewritten(file: Path, **changes: Any) -> Path:
    """The same tensors with other metadata, in a whole file whose digest is right."""
    metadata, tensors = fileformat.read(file)
    fileformat.write(file, tensors, metadata.model_copy(update=changes))
    return file


def configured(file: Path, **changes: Any) -> list[Any]:
    """The configurations of a file, the first one changed."""
    first, *others = fileformat.read(file)[0].configurations
    return [first.model_copy(update=changes), *others]


def with_text(file: Path, text: str, tensors: dict[str, Tensor] | None = None) -> Path:
    """A safetensors file whose metadata is this text."""
    save_file({"0.A": torch.zeros(1)} if tensors is None else tensors, file, {"lora_lite": text})
    return file


LONG = 10**6
TEXTS = {
    "deep lists": "[" * 10**5,
    "deep and closed": "[" * 10**5 + "]" * 10**5,
    "deep objects": '{"a":' * 10**5 + "1" + "}" * 10**5,
    "long integer as format": '{"format": ' + "9" * 5_000 + "}",
    "long negative integer": '{"format": -' + "9" * 5_000 + "}",
    "long float": '{"format": 1, "scale": ' + "9" * 5_000 + ".0}",
    "exponent": '{"format": 1e999999}',
    "negative format": '{"format": -1}',
    "huge format": '{"format": 99999999999999999999}',
    "format true": '{"format": true}',
    "format as text": '{"format": "1"}',
    "format null": '{"format": null}',
    "empty": "",
    "a number": "3",
    "null": "null",
    "a list": "[]",
    "a text": '"x"',
    "NaN": "NaN",
    "empty object": "{}",
    "byte order mark": "\ufeff{}",
    "null byte": "\x00",
    "lone surrogate": '{"variant": "\\ud800"}',
    "repeated keys": '{"format": 1, "format": 1}',
    "a long name": json.dumps({"format": 1, "variant": "x" * LONG}),
    "a long newer format": json.dumps({"format": 99, "core": "9" * LONG}),
}


@pytest.mark.filterwarnings("ignore::lora_lite.AdapterWarning")  # of format 1, without a digest
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_metadata_of_any_text(tmp_path: Path, untouched: Untouched, text: str) -> None:
    """Promise: metadata that is no metadata is an AdapterFileError, in a moment, and the error is
    short, whatever the length of what it complains of."""
    path = with_text(tmp_path / "a", text)
    with untouched(base := model()):
        assert judged(path, trained(), base) == "refused"


NAMES = {
    "null byte": "0\x00",
    "escape codes": "0\x1b[2J\x1b]0;owned\x07",
    "newlines": "0\n\n  everything is fine",
    "1 MB": "x" * LONG,
    "1 MB of dots": "." * LONG,
    "1 MB of near names": "0." + "weight" * (LONG // 6),
    "right to left": "0\u202egnp",
    "empty": "",
    "attribute": "__class__",
    "dotted attributes": "0.__dict__",
    "a module's own": "_modules",
}


CONTROL = {"\x00", "\x1b", "\x07", "\x9b", "\r", "\u202e"}


def with_site(file: Path, name: str) -> None:
    """Rename the site "0" of a file."""
    metadata, tensors = fileformat.read(file)
    sites = {name if path == "0" else path: index for path, index in metadata.sites.items()}
    renamed = {
        (f"{name}{key[1:]}" if key.startswith("0.") else key): t for key, t in tensors.items()
    }
    fileformat.write(file, renamed, metadata.model_copy(update={"sites": sites}))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_sites_of_any_name(file: Path, untouched: Untouched, name: str) -> None:
    """Promise: a site's name is text from a stranger: unknown to the model, it is refused in a
    moment, and the error, which goes to terminals and logs, holds no control character of it and no
    more than a line or two."""
    with_site(file, name)
    start = time.monotonic()
    with untouched(base := model()), pytest.raises(ll.AdapterFileError) as caught:
        ll.load(base, file)
    assert time.monotonic() - start < SECONDS
    assert len(str(caught.value)) < 5_000
    assert not CONTROL & set(str(caught.value))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_inspect_prints_no_escape_codes(
    file: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Promise: no text of a file reaches the terminal raw, or in a length that fills it: no path,
    no provider, no version, no name of a variant.
    """
    from lora_lite.cli import main

    whole = file.read_bytes()
    changes: list[dict[str, Any]] = [
        {"configurations": configured(file, provider=name)},
        {"configurations": configured(file, variant=name)},
        {"core": name},
        {},
    ]
    for change in changes:
        file.write_bytes(whole)
        if change:
            rewritten(file, **change)
        else:
            with_site(file, name)
        main(["inspect", str(file)])
        printed = "".join(capsys.readouterr())
        assert printed
        assert not CONTROL & set(printed)
        assert len(printed) < 20_000


def test_a_fingerprint_of_60_megabytes(tmp_path: Path) -> None:
    """Promise: a file cannot make its reader take memory or time by a long fingerprint; nor by
    deep or long texts. Held in a process of its own whose memory is limited."""
    trained().save(tmp_path / "a")
    rewritten(tmp_path / "a", fingerprint={"0": bytes(60_000_000), "1": b"12345678"})
    for number, text in enumerate(TEXTS.values()):
        with_text(tmp_path / f"text{number}", text)
    code = """
import resource, sys, time, warnings
from pathlib import Path
import torch, lora_lite as ll
from torch import nn

model = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])
ll.attach(model, "lora", targets=".", r=4).save(sys.argv[1] + "/small")
ll.detach(model)
warnings.simplefilter("ignore")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 800_000_000,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.monotonic()
    try:
        ll.load(model, path).detach()
    except ll.AdapterFileError as error:
        assert len(str(error)) < 5000
    else:
        assert path.name == "small", path
    assert time.monotonic() - start < 5, path
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fingerprint",
    [{}, {"0": b""}, {"0": b"", "1": b""}, {"elsewhere": b"12345678"}],
    ids=["none", "one, empty", "all empty", "of another site"],
)
def test_an_empty_fingerprint_is_no_way_around_the_check(
    tmp_path: Path, untouched: Untouched, fingerprint: dict[str, bytes]
) -> None:
    """Promise: a file cannot switch the check of the base off: without samples of each site it is
    refused; `check_base=False`, which is the reader's own word, loads it."""
    path = tmp_path / "a"
    adapter = trained("antipasto")
    adapter.save(path)
    rewritten(path, fingerprint=fingerprint)
    with untouched(base := model()), pytest.raises(ll.AdapterFileError):
        ll.load(base, path)
    if not any(fingerprint.values()) and fingerprint:
        return  # metadata that nobody would write
    assert is_same(ll.load(base, path, check_base=False), adapter)


LIES: dict[str, dict[str, Any]] = {
    "scale nan": {"scale": float("nan")},
    "scale inf": {"scale": float("inf")},
    "negative format": {"format": -3},
    "format 0": {"format": 0},
    "no sites": {"sites": {}},
    "a site too few": {"sites": {"0": 0}},
    "a site too many": {"sites": {"0": 0, "1": 0, "2": 0}},
    "a configuration that is not there": {"sites": {"0": 0, "1": 1}},
    "a negative configuration": {"sites": {"0": 0, "1": -1}},
    "a huge configuration": {"sites": {"0": 0, "1": 10**30}},
    "no configurations": {"configurations": []},
    "no dtypes": {"dtypes": []},
    "other dtypes": {"dtypes": ["A float64", "B float32"]},
}


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES)
def test_metadata_that_lies(file: Path, untouched: Untouched, changes: dict[str, Any]) -> None:
    """Promise: a whole file whose metadata says what cannot be is refused as a file."""
    rewritten(file, **changes)
    with untouched(base := model()):
        assert judged(file, trained(), base) == "refused"


WRONG_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "negative format": {"variant_format": -1},
    "format 0": {"variant_format": 0},
    "huge format": {"variant_format": 10**30},
    "no fields": {"fields": ""},
    "fields of a list": {"fields": "[]"},
    "fields of null": {"fields": "null"},
    "deep fields": {"fields": "[" * 10**5},
    "a long number": {"fields": '{"r": ' + "9" * 5_000 + "}"},
    "a float": {"fields": '{"r": 4.0}'},
    "a huge rank": {"fields": '{"r": 1000000000}'},
    "a misfit": {"fields": '{"r": 5}'},
    "unknown fields": {"fields": '{"r": 4, "x": 1}'},
    "1 MB of an unknown field": {"fields": '{"r": 4, "' + "x" * LONG + '": 1}'},
    "alpha infinite": {"fields": '{"r": 4, "alpha": Infinity}'},
}


@pytest.mark.parametrize("changes", WRONG_CONFIGURATIONS.values(), ids=WRONG_CONFIGURATIONS)
def test_configurations_that_lie(file: Path, untouched: Untouched, changes: dict[str, Any]) -> None:
    """Promise: so is one whose variant cannot have these fields, or this format."""
    rewritten(file, configurations=configured(file, **changes))
    with untouched(base := model()):
        assert judged(file, trained(), base) == "refused"


@pytest.mark.parametrize("derived", [True, False])
def test_derived_tensors_that_lie(tmp_path: Path, untouched: Untouched, derived: bool) -> None:
    """Promise: so is one that holds no derived tensors and says that it does; one that holds them
    though it says not is the same adapter or refused."""
    expected = trained("antipasto")
    expected.save(path := tmp_path / "a", derived=not derived)
    rewritten(path, derived=derived)
    with untouched(base := model()):
        outcome = judged(path, expected, base)
    assert outcome == "refused" or not derived


DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float8_e4m3fn", "float8_e5m2", "complex64", "bool", "int8", "uint8", "int64", "uint16",
    )
    if hasattr(torch, name)
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("listed", [True, False], ids=["declared", "not declared"])
def test_tensors_of_other_dtypes(
    file: Path, untouched: Untouched, dtype: torch.dtype, listed: bool
) -> None:
    """Promise: a tensor of a dtype that no adapter can have (float8, complex, integers) is named,
    whether or not the file's metadata admits it."""
    metadata, tensors = fileformat.read(file)
    tensors["0.A"] = tensors["0.A"].to(dtype)
    if listed:
        name = str(dtype).removeprefix("torch.")
        metadata = metadata.model_copy(update={"dtypes": [*metadata.dtypes, f"A {name}"]})
    try:
        fileformat.write(file, tensors, metadata)
    except ll.AdapterFileError:  # refused where it is written: as good
        save_file(tensors, file, {"lora_lite": metadata.model_dump_json()})
    with untouched(base := model()), pytest.raises(ll.AdapterFileError):
        ll.load(base, file)


def test_float16_that_overflows_on_load(file: Path, untouched: Untouched) -> None:
    """Promise: load(dtype=) checks what the cast makes of the values, as load_state_dict does."""
    adapter = trained()
    first = next(name for name, _ in adapter.named_parameters())
    with torch.no_grad():
        dict(adapter.named_parameters())[first][0, 0] = 1e5
    adapter.save(file)
    with (
        untouched(base := model()),
        pytest.raises(ll.AdapterFileError, match=first.replace(".", r"\.")),
    ):
        ll.load(base, file, dtype=torch.float16)
    half = ll.attach(base, "lora", targets=".", r=4, dtype=torch.float16)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    with pytest.raises(ll.AdapterFileError, match=first.replace(".", r"\.")):
        half.load_state_dict(adapter.state_dict())
    assert all(torch.equal(before[name], value) for name, value in half.state_dict().items())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_scale_must_be_finite(scale: float) -> None:
    """Promise: a scale that is no number is refused when it is set, and so never saved."""
    adapter = trained()
    with pytest.raises(ll.LoraLiteError, match="scale"):
        adapter.scale = scale
    assert adapter.scale == 1.0


# --- no regular file


@pytest.mark.parametrize(
    "what", ["fifo", "directory", "empty", "device", "socket", "link to itself"]
)
def test_what_is_no_regular_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Untouched, what: str
) -> None:
    """Promise: a pipe, a folder, a device, an empty file is refused at once: nobody waits for a
    writer that never comes."""
    path = tmp_path / "a"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "device":
        path = Path("/dev/zero")
    elif what == "socket":
        import socket

        bound = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        bound.bind("a")
        bound.close()
    else:
        path.symlink_to(path)

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with untouched(base := model()), pytest.raises(ll.AdapterFileError):
            ll.load(base, path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("path", ["\x00", "a\x00b", "\ud800", "a\ud800/b", "x" * 5_000, "", "/"])
def test_paths_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Untouched, path: str
) -> None:
    """Promise: null bytes, surrogates and endless paths are errors of ours, in load and in save."""
    monkeypatch.chdir(tmp_path)
    adapter = trained()
    with untouched(base := model()), pytest.raises(ll.AdapterFileError):
        ll.load(base, path)
    with pytest.raises(ll.AdapterFileError):
        adapter.save(path)
    assert not list(tmp_path.iterdir())


# --- files of others


def test_files_without_a_digest_still_load(file: Path) -> None:
    """Promise: a file written before there was a digest loads for ever, with a note that it has
    none."""
    adapter = trained()
    with safetensors.safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        texts = dict(opened.metadata())
    header = json.loads(texts["lora_lite"])
    (configuration,) = header.pop("configurations")
    del header["digest"]
    old = {
        **header,
        "format": 1,
        "variant": configuration["variant"],
        "variant_format": configuration["variant_format"],
        "provider": configuration["provider"],
        "sites": dict.fromkeys(header["sites"], configuration["fields"]),
    }
    save_file(tensors, file, {"lora_lite": json.dumps(old)})
    with pytest.warns(ll.AdapterWarning, match="digest"):
        again = ll.load(model(), file)
    assert is_same(again, adapter)


def test_another_models_adapter_is_refused_at_once(
    tmp_path: Path, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: where nothing fits, the search for similar names does not compare every name of the
    file with every name of the model, which took half a minute."""
    count = 2_000
    compared: list[int] = []

    def close_matches(_word: str, possibilities: list[str], **_: object) -> list[str]:
        compared.append(len(possibilities))
        return []

    monkeypatch.setattr("difflib.get_close_matches", close_matches)
    other = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(2, 2)}) for _ in range(count)])}
    )
    ll.attach(other, "lora", r=1).save(tmp_path / "a")
    own = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"projo": nn.Linear(2, 2)}) for _ in range(count)])}
    )
    with untouched(own), pytest.raises(ll.AdapterFileError, match=str(count)):
        ll.load(own, tmp_path / "a")
    assert 0 < sum(compared) < 1_000
