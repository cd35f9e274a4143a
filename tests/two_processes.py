"""What tests with two processes share: how they are launched, and how each of them leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(worker: Path, *arguments: str | Path) -> None:
    """Run a script in two processes of one thread each; what they printed is in the failure."""
    done = subprocess.run(
        [*TORCHRUN, str(worker), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def leave() -> NoReturn:
    """End this process once the other has come as far.

    The interpreter is not taken down: threads of gloo may then still be waiting for a peer that has
    gone, and abort the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
