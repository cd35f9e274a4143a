"""The loop: its schedule, its data, its batches, and that a kill changes nothing."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Example
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.full import FullModel
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.results import Point, Result
from lora_lite_benchmark.train import batch_rows, learning_rate, train

Make = Callable[..., RunConfig]

EXAMPLES = [Example([5 + i, 9, 12, 7 + i % 3, 20, 1][: 4 + i % 3], 2) for i in range(10)]


def trained(config: RunConfig, folder: Path) -> tuple[list[Point], torch.nn.Module]:
    model = load_model(config)
    return train(
        model, FullModel(model), EXAMPLES, config, Accelerator(), 0, folder / "checkpoint.pt"
    ), model


def test_the_learning_rate_rises_then_falls(make_config: Make) -> None:
    """Up in a line to lr over the warm-up, down in half a cosine, never zero before the end."""
    config = make_config(steps=100, warmup=0.1, lr=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.25 * (1 + math.cos(math.pi * 89 / 90)))


@given(
    rows=st.integers(1, 40),
    steps=st.integers(1, 30),
    size=st.integers(1, 17),
    seed=st.integers(0, 2**31),
)
def test_every_row_is_seen_once_an_epoch(
    make_config: Make, rows: int, steps: int, size: int, seed: int
) -> None:
    """Whatever the sizes, each run of `rows` draws holds every row once, also where an epoch ends
    inside a batch.
    """
    config = make_config(batch_size=size, steps=steps, seed=seed)
    drawn = [row for step in range(steps) for row in batch_rows(step, rows, config)]
    assert len(drawn) == steps * size
    for start in range(0, len(drawn) - rows + 1, rows):
        assert sorted(drawn[start : start + rows]) == list(range(rows))


def test_the_seed_orders_the_data(make_config: Make) -> None:
    """The same seed gives the same order, another seed another one, and epochs differ."""
    one, two = make_config(seed=1, batch_size=50), make_config(seed=2, batch_size=50)
    assert batch_rows(0, 50, one) == batch_rows(0, 50, one)
    assert batch_rows(0, 50, one) != batch_rows(0, 50, two)
    assert batch_rows(0, 50, one) != batch_rows(1, 50, one)


def test_small_forwards_add_up_to_the_batch(make_config: Make, tmp_path: Path) -> None:
    """Splitting a batch to save memory does not change the loss or what is learnt: each answer
    token weighs the same.
    """
    whole, model = trained(make_config("full", steps=3, lr=1e-3), tmp_path / "whole")
    parts, other = trained(
        make_config("full", steps=3, lr=1e-3, micro_batch_size=1), tmp_path / "parts"
    )
    assert [point.loss for point in parts] == pytest.approx(
        [point.loss for point in whole], rel=1e-5
    )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_it_learns(make_config: Make, tmp_path: Path) -> None:
    """The loss on ten rows falls to a fraction within forty steps."""
    curve, _ = trained(make_config("full", steps=40, lr=1e-2), tmp_path)
    assert curve[-1].loss < 0.5 * curve[0].loss


def test_a_diverging_run_stops(make_config: Make, tmp_path: Path) -> None:
    """A loss that is no longer a number ends the run with advice instead of a row of noise."""
    model = load_model(make_config("full"))
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(BenchmarkError, match=r"at step 0\. .* Try a smaller lr than"):
        train(
            model,
            FullModel(model),
            EXAMPLES,
            make_config("full"),
            Accelerator(),
            0,
            tmp_path / "checkpoint.pt",
        )


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist on Windows")
def test_a_killed_run_ends_in_the_same_bits(arguments: list[str], tmp_path: Path) -> None:
    """Killed at a random moment after a checkpoint and started again, a run with dropout saves the
    very file that an undisturbed run saves, and its curve has every step once.
    """
    command = [
        sys.executable,
        "-m",
        "lora_lite_benchmark",
        "run",
        *arguments,
        "--variants",
        "lora:dropout=0.2",
        "--no-base",
    ]
    command += ["--steps", "60", "--checkpoint-every", "2", "--lr", "0.01", "--test-count", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--out", str(tmp_path / "whole")],
        check=True,
        capture_output=True,
        env=environment,
    )

    killed = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    while not list(tmp_path.glob("killed/*/checkpoint.pt")) and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (
        "the run ended before it could be killed: make it longer"
    )
    assert not list(tmp_path.glob("killed/*/result.json"))
    again = subprocess.run(
        [*command, "--out", str(tmp_path / "killed")],
        check=True,
        capture_output=True,
        env=environment,
    )

    files = {
        name: next(tmp_path.glob(f"{name}/*/adapter.safetensors")).read_bytes()
        for name in ("whole", "killed")
    }
    assert files["whole"] == files["killed"], again.stderr.decode()[-2000:]
    assert not list(tmp_path.glob("*/*/checkpoint.pt"))


TIMES = {"forward_ms", "backward_ms", "inference_ms", "calibration_s", "init_s", "train_s"}
TIMES |= {f"{name}_ratio{end}" for name in ("inference", "step") for end in ("", "_low", "_high")}
TIMES |= {"peak_memory_bytes"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist on Windows")
def test_killed_ten_times(arguments: list[str], tmp_path: Path) -> None:
    """Killed nine times wherever it happens to be, and once between the adapter's file and the
    result's, a run leaves the file of an undisturbed one, bit for bit, and its result but for times
    and memory; nothing half-written stays behind.
    """
    command = [
        sys.executable,
        "-m",
        "lora_lite_benchmark",
        "run",
        *arguments,
        "--variants",
        "pissa:r=4,dropout=0.2",
        "--no-base",
    ]
    command += ["--steps", "300", "--checkpoint-every", "3", "--lr", "0.01", "--out"]
    log = tmp_path / "log"

    def start(name: str) -> subprocess.Popen[bytes]:
        """The run, once it has said that it begins."""
        with log.open("wb") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [*command, str(tmp_path / name)],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=environment,
            )
        while "row 1 of 1" not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        return process

    whole = start("whole")
    began = time.monotonic()
    assert whole.wait() == 0
    duration = time.monotonic() - began

    waits = [random.uniform(0, duration / 5) for _ in range(9)]
    for wait in waits:
        process = start("killed")
        time.sleep(wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (
            f"it ended before the last kill; waits were {waits}"
        )
    process = start("killed")
    while not list(tmp_path.glob("killed/*/adapter.safetensors")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("killed/*/result.json"))
    assert start("killed").wait() == 0

    folders = [next(tmp_path.glob(f"{name}/pissa-*")) for name in ("whole", "killed")]
    one, two = ((folder / "adapter.safetensors").read_bytes() for folder in folders)
    assert one == two, waits
    exclude: Any = {"measurements": TIMES}
    one_result, two_result = (Result.load(folder) for folder in folders)
    assert one_result is not None
    assert two_result is not None
    assert one_result.model_dump(exclude=exclude) == two_result.model_dump(exclude=exclude)
    assert {path.name for path in folders[1].iterdir()} == {"adapter.safetensors", "result.json"}
