"""Writing: always one whole file, whoever else writes, whatever fails, wherever it is killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import nn

Make = Callable[..., nn.Module]

# What the processes below have in common: one model, and adapters whose every value is one number.
PRELUDE = """
import os, signal, sys
import torch, lora_lite as ll
from torch import nn
torch.set_num_threads(1)

def model():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

def filled(value):
    adapter = ll.attach(model(), "lora", r=8)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(value)
    return adapter

path = sys.argv[1]
"""


def model() -> nn.Module:
    """As in PRELUDE."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])


def filled(value: float) -> ll.Adapter:
    """As in PRELUDE."""
    adapter = ll.attach(model(), "lora", r=8)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(value)
    return adapter


def value_in(path: Path) -> float:
    """The one number that the file's adapter is made of; the file is whole."""
    tensors = ll.load(model(), path).state_dict().values()
    found = {number for tensor in tensors for number in tensor.unique().tolist()}
    assert len(found) == 1, f"the file mixes several adapters: {found}"
    return found.pop()


def process(code: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs PRELUDE and `code` on a path."""
    command = [sys.executable, "-c", PRELUDE + code, str(path), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(running: subprocess.Popen[str]) -> str:
    """What a process printed, once it is done without an error."""
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    return out


# --- several writers


def test_threads_that_save_to_one_path(tmp_path: Path) -> None:
    """Promise: of several threads that save to one path at once, each succeeds, and whoever reads
    finds one whole file at any moment."""
    path, errors, done = tmp_path / "a", [], threading.Event()
    writers = [filled(float(number)) for number in range(1, 5)]
    writers[0].save(path)

    def write(adapter: ll.Adapter) -> None:
        try:
            for _ in range(8):
                adapter.save(path)
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                assert value_in(path) in {1.0, 2.0, 3.0, 4.0}
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    threads = [threading.Thread(target=write, args=(adapter,)) for adapter in writers]
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert value_in(path) in {1.0, 2.0, 3.0, 4.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_takes_no_other_writers_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a save that fails removes its own temporary file, and never that of another save to
    the same path, which goes on and succeeds."""
    path = tmp_path / "a"
    filled(1.0).save(path)
    slow, failing = filled(2.0), filled(3.0)
    real, reached, go_on = os.fsync, threading.Event(), threading.Event()

    def fsync(fd: int) -> None:
        if threading.current_thread().name == "slow" and not reached.is_set():
            reached.set()
            assert go_on.wait(30)
        if threading.current_thread().name == "failing":
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    errors: dict[str, BaseException] = {}

    def save(adapter: ll.Adapter) -> None:
        try:
            adapter.save(path)
        except BaseException as error:
            errors[threading.current_thread().name] = error

    first = threading.Thread(target=save, args=(slow,), name="slow")
    first.start()
    assert reached.wait(30)
    second = threading.Thread(target=save, args=(failing,), name="failing")
    second.start()
    second.join()
    assert value_in(path) == 1.0
    go_on.set()
    first.join()
    assert errors.keys() == {"failing"}
    assert isinstance(errors["failing"], ll.AdapterFileError)
    assert value_in(path) == 2.0
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_save_to_one_path(tmp_path: Path) -> None:
    """Promise: the same for processes, also where they have the same process number (as in two
    containers that share a volume)."""
    path = tmp_path / "a"
    filled(1.0).save(path)
    code = """
os.getpid = lambda: 7
adapter = filled(float(sys.argv[2]))
for _ in range(30):
    adapter.save(path)
"""
    running = [process(code, path, value) for value in ("2", "3")]
    seen = set()
    while any(one.poll() is None for one in running):
        seen.add(value_in(path))
    for one in running:
        finished(one)
    assert seen <= {1.0, 2.0, 3.0}
    assert value_in(path) in {2.0, 3.0}
    assert list(tmp_path.iterdir()) == [path]


# --- killed


def kill_while_saving(path: Path, delay: float) -> None:
    """Kill a process that saves in a loop, a moment after its first save."""
    saving = process(
        """
adapter = filled(5.0)
while True:
    adapter.save(path)
    print("saved", flush=True)
""",
        path,
    )
    assert saving.stdout is not None
    assert saving.stdout.readline() == "saved\n"
    time.sleep(delay)
    saving.send_signal(signal.SIGKILL)
    saving.communicate()
    assert saving.returncode == -signal.SIGKILL


def rounds_of_killing(folder: Path, rounds: int) -> None:
    """After every kill the file is whole; after one more save it is alone."""
    path = folder / "a"
    filled(1.0).save(path)
    for number in range(rounds):
        kill_while_saving(path, delay=0.0007 * (1 + number * 7 % 13))
        assert value_in(path) == 5.0
    filled(2.0).save(path)
    assert value_in(path) == 2.0
    assert list(folder.iterdir()) == [path]


def test_kill_during_saves(tmp_path: Path) -> None:
    """Promise: a process killed with signal 9 while it saves leaves one whole file."""
    rounds_of_killing(tmp_path, 2)


@pytest.mark.slow
def test_kill_during_many_saves(tmp_path: Path) -> None:
    """Promise: as above, at many moments."""
    rounds_of_killing(tmp_path, 40)


@pytest.mark.parametrize("name", ["a", "n" * 255])
def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path, name: str) -> None:
    """Promise: a temporary file of a killed writer does not stay for ever: the next save to the
    same path removes it, and nothing that is not its own.
    """
    path = tmp_path / name
    filled(1.0).save(path)
    others = {tmp_path / other for other in (".mine.tmp", ".a.tmp", "a.tmp", "b", ".b.1.tmp")}
    for other in others:
        other.write_text("mine")
    killed = process(
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\nfilled(2.0).save(path)", path
    )
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = set(tmp_path.iterdir()) - {path, *others}
    assert len(left) == 1, "the killed writer had no temporary file beside the target"
    assert value_in(path) == 1.0
    filled(3.0).save(path)
    assert value_in(path) == 3.0
    assert set(tmp_path.iterdir()) == {path, *others}


# --- what was there


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Promise: the temporary file's name cannot be foreseen, and an existing file is never taken
    for it, so a link that was planted beside the target leads nowhere.
    """
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("precious")
    names = [f".a.{os.getpid()}.tmp", ".a.tmp", "a.tmp", "a~", ".a", f".a.{os.getpid()}", "a.part"]
    for name in names:
        (tmp_path / name).symlink_to(victim)
    filled(1.0).save(path)
    assert victim.read_text() == "precious"
    assert all((tmp_path / name).is_symlink() for name in names)
    assert value_in(path) == 1.0


def test_temporary_names_cannot_be_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: two saves of one process to one path use temporary files of different names, in the
    target's folder, that are created and not merely opened."""
    path, seen, real = tmp_path / "a", [], os.fsync

    def fsync(fd: int) -> None:
        seen.append({p.name for p in tmp_path.iterdir()} - {"a"})
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    adapter = filled(1.0)
    adapter.save(path)
    adapter.save(path)
    names = [name for found in seen for name in found]
    assert len(names) == len(set(names)) == 2


def test_file_and_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: after a save returns, the bytes and the name outlast a power cut: the file is synced
    before it gets its name, the folder after."""
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def replaced(*args: Any, **kwargs: Any) -> None:
        steps.append("rename")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    filled(1.0).save(tmp_path / "a")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_the_mode_of_an_existing_file_stays(tmp_path: Path, mode: int) -> None:
    """Promise: saving over a private file does not make it public, nor the reverse."""
    path = tmp_path / "a"
    path.touch()
    path.chmod(mode)
    filled(1.0).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert value_in(path) == 1.0


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path, mask: int) -> None:
    """Promise: a new file's mode is the process's, not that of a private temporary file."""
    before = os.umask(mask)
    try:
        filled(1.0).save(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, absolute: bool) -> None:
    """Promise: saving to a symbolic link writes the file that it leads to, in its folder."""
    (tmp_path / "store").mkdir()
    real, link, twice = tmp_path / "store" / "real", tmp_path / "link", tmp_path / "twice"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real if absolute else Path("store") / "real")
    twice.symlink_to("link")
    for number, path in enumerate((link, twice)):
        filled(float(number)).save(path)
        assert link.is_symlink()
        assert twice.is_symlink()
        assert value_in(real) == value_in(path) == number
        assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert list((tmp_path / "store").iterdir()) == [real]


def test_a_link_that_leads_nowhere_makes_its_file(tmp_path: Path) -> None:
    """Promise: a link to a file that is not there yet creates it."""
    (tmp_path / "link").symlink_to("new")
    filled(1.0).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert value_in(tmp_path / "new") == 1.0


@pytest.mark.parametrize(
    "name",
    ["n" * 200, "n" * 250, "n" * 255, "ä" * 127, "模" * 85, "😀" * 63],
    ids=["200", "250", "255", "2 bytes each", "3 bytes each", "4 bytes each"],
)
def test_names_up_to_the_limit_of_the_file_system(tmp_path: Path, name: str) -> None:
    """Promise: any name that the file system takes can be saved to; what it does not take is an
    error, and leaves nothing behind."""
    filled(1.0).save(tmp_path / name)
    assert value_in(tmp_path / name) == 1.0
    with pytest.raises(ll.AdapterFileError, match="cannot be written"):
        filled(1.0).save(tmp_path / (name + "n" * 256))
    assert list(tmp_path.iterdir()) == [tmp_path / name]


# --- what fails


NOBODY = 65534


def test_a_folder_that_must_not_be_written(tmp_path: Path) -> None:
    """Promise: a read-only folder is an error of ours, and the old file stays."""
    path = tmp_path / "folder" / "a"
    path.parent.mkdir()
    filled(1.0).save(path)
    path.parent.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o555)
    code = f"""
adapter = filled(2.0)
if os.geteuid() == 0:
    os.setuid({NOBODY})
for name in (path, path + ".new"):
    try:
        adapter.save(name)
    except ll.AdapterFileError as error:
        print(type(error).__name__)
"""
    try:
        assert finished(process(code, path)) == "AdapterFileError\n" * 2
    finally:
        path.parent.chmod(0o755)
    assert value_in(path) == 1.0
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk(tmp_path: Path) -> None:
    """Promise: where the bytes do not all fit, the error is ours, the old file stays, and no
    temporary file takes up what room there is."""
    path = tmp_path / "a"
    filled(1.0).save(path)
    limits = (0, 100, 10_000)
    assert path.stat().st_size > max(limits)
    code = f"""
import resource
adapter = filled(2.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in {limits}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        adapter.save(path)
    except ll.AdapterFileError as error:
        assert path in str(error), error
        print(type(error).__name__, os.listdir(os.path.dirname(path)))
"""
    assert finished(process(code, path)) == "AdapterFileError ['a']\n" * len(limits)
    assert value_in(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


def _nan(p: nn.Parameter) -> None:
    p.data[0, 0] = torch.nan


def _inf(p: nn.Parameter) -> None:
    p.data[0, 0] = -torch.inf


def _empty(p: nn.Parameter) -> None:
    p.data = torch.empty(0)  # what ZeRO-3 leaves of a parameter outside of its own forward


def _misshapen(p: nn.Parameter) -> None:
    p.data = p.data[:1].clone()


def _flattened(p: nn.Parameter) -> None:
    p.data = p.data.flatten()


def _float8(p: nn.Parameter) -> None:
    p.data = p.data.to(torch.float8_e4m3fn)


def _complex(p: nn.Parameter) -> None:
    p.data = p.data.to(torch.complex64)


REFUSED = {
    "nan": _nan,
    "inf": _inf,
    "empty": _empty,
    "misshapen": _misshapen,
    "flattened": _flattened,
    "float8": _float8,
    "complex": _complex,
}


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_save_refuses_what_load_would_refuse(
    tmp_path: Path, damage: Callable[[nn.Parameter], None]
) -> None:
    """Promise: a tensor with which the file could not be loaded again is refused when it is saved,
    by the name of its layer, while the model is still there; the old file stays."""
    path = tmp_path / "a"
    adapter = filled(1.0)
    adapter.save(path)
    old = path.read_bytes()
    name, parameter = list(adapter.named_parameters())[3]
    layer, _, tensor = name.rpartition(".")
    damage(parameter)
    with pytest.raises(ll.LoraLiteError, match=rf"{layer}.*{tensor}"):
        adapter.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_come_back(tmp_path: Path) -> None:
    """Promise: tied tensors are saved as what each of them is, or refused; never lost."""
    adapter = filled(1.0)
    first, second, *_ = [p for name, p in adapter.named_parameters() if name.endswith("A")]
    second.data = first.data
    first.data[0, 0] = 7.0
    try:
        adapter.save(tmp_path / "a")
    except ll.AdapterFileError:
        assert not list(tmp_path.iterdir())
        return
    again = ll.load(model(), tmp_path / "a").state_dict()
    for name, value in adapter.state_dict().items():
        assert torch.equal(again[name], value), name


def test_a_view_of_a_larger_tensor_takes_its_own_room(tmp_path: Path) -> None:
    """Promise: a parameter that is a view (as optimizers with flat buffers make) is saved alone."""
    plain, viewed = filled(1.0), filled(1.0)
    for p in viewed.parameters():
        large = torch.zeros(1000, *p.shape)
        large[500] = p.data
        p.data = large[500]
    plain.save(tmp_path / "plain")
    viewed.save(tmp_path / "viewed")
    assert (tmp_path / "viewed").stat().st_size == (tmp_path / "plain").stat().st_size
    assert value_in(tmp_path / "viewed") == 1.0


def test_an_interrupt_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: Ctrl-C during a save leaves the old file and no temporary one."""
    path = tmp_path / "a"
    filled(1.0).save(path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                filled(2.0).save(path)
        assert value_in(path) == 1.0
        assert list(tmp_path.iterdir()) == [path]
