"""The Trainer under DeepSpeed: two processes train as one does, and checkpoints hold no base."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_transformers import deepspeed
from torch import nn
from transformers import trainer as trainers

WORKER = Path(__file__).with_name("deepspeed_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
BASE_BYTES = 4 * 6000  # of float32 in the base of the worker, which has more


def run(folder: Path, stage: int, method: str, *checkpoint: str) -> tuple[list[float], Any]:
    """The losses and the adapter's state at the end."""
    launch = TORCHRUN if stage else []
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(folder), str(stage), method, *checkpoint],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "losses.json").read_text()), torch.load(folder / "state")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("method", ["lora", "dora", "hra", "antipasto"])
def test_two_processes_train_as_one_does(tmp_path: Path, method: str, stage: int) -> None:
    """Losses, with penalty and decay; checkpoints without the base; a resumed run of the same
    bits.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make deepspeed` does it")
    expected, end = run(tmp_path / "one", 0, method)
    losses, state = run(tmp_path / "two", stage, method)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, value in end.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert (checkpoint / "default.adapter.safetensors").is_file()
    states = checkpoint.glob("global_step2/*model_states.pt")
    assert sum(file.stat().st_size for file in states) < BASE_BYTES

    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-2")
    again, resumed = run(tmp_path / "resumed", stage, method, str(checkpoint))
    assert again == losses
    assert all(torch.equal(resumed[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, "Use ZeRO-2, or FSDP2"),
        ({"optimizer": {"type": "AdamW"}}, "its own 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "its own 'scheduler'"),
    ],
)
def test_what_deepspeed_would_do_otherwise_is_refused(config: dict[str, Any], says: str) -> None:
    """A part of its config that the method's rules would be lost by is named, with the way out."""
    with pytest.raises(ll.AdapterError, match=says):
        deepspeed.refuse_unfit(config, [])


def test_an_adapter_that_is_held_after_every_step_is_refused() -> None:
    """DeepSpeed steps on a copy of the parameters, and writes it over what `project` has done."""
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = ll.attach(model, "lora", r=2, targets=r"0$", name="mine")
    with pytest.raises(ll.AdapterError, match="'mine' changes its parameters after every step"):
        deepspeed.refuse_unfit({"zero_optimization": {"stage": 2}}, [adapter])
    deepspeed.refuse_unfit({"zero_optimization": {"stage": 2}}, [])


def test_the_function_that_is_exchanged_is_there_with_the_same_parameters() -> None:
    """A transformers that renames or changes it is seen here, and not in a user's checkpoint."""
    original = getattr(trainers, deepspeed.LOAD)
    assert tuple(inspect.signature(original).parameters) == deepspeed.PARAMETERS
    with deepspeed.loads_adapters(nn.Linear(2, 2)):
        assert getattr(trainers, deepspeed.LOAD) is not original
    assert getattr(trainers, deepspeed.LOAD) is original
