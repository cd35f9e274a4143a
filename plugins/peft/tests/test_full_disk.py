"""A disk that is full: an error, and neither half a folder nor the loss of the one before."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
from torch import nn

Make = Callable[..., nn.Module]

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no limit on the size of files"
)

WRITER = """
import resource, signal, sys, torch, lora_lite as ll
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])
adapter = ll.attach(model, "lora", r=8)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    adapter.save(sys.argv[1], format="peft")
except ll.AdapterFileError as error:
    print(error)
"""


def said_with_a_full_disk(path: Path) -> str:
    """What the writer of a folder says where no file can grow beyond 4 kB, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], capture_output=True, text=True, check=True
    ).stdout


def test_no_folder_is_left(tmp_path: Path) -> None:
    assert "out cannot be written: File too large" in said_with_a_full_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_before_is_untouched(blocks: Make, tmp_path: Path) -> None:
    """Promise: an adapter that was there still loads, with the same files."""
    ll.attach(blocks(), "lora", r=2).save(tmp_path / "out", format="peft")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "cannot be written" in said_with_a_full_disk(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    ll.load(blocks(), tmp_path / "out")
