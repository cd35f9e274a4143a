"""Runs under the Trainer that are killed at random moments end in the bits of an unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("killed_worker.py")
METHODS = ("lora", "dora", "antipasto", "adalora", "recipe")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forks, which this system lacks")
@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bits(tmp_path: Path, kills: int) -> None:
    """For methods with dropout, derived tensors and a clock, and for what trains beside one."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), str(kills), *METHODS],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for method in METHODS:
        whole, killed = (
            load_file(tmp_path / method / name / "trained") for name in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        for name, tensor in whole.items():
            assert tensor.equal(killed[name]), f"{method}: {name}"
