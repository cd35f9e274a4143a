"""Two processes on one machine, started by accelerate's launcher, do what one does: each with the
whole model, or with its shard (FSDP2).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.processes import refuse_unshardable
from lora_lite_benchmark.results import Result, load_results
from safetensors.torch import load_file

ROWS = ["lora:r=2", "hra:r=2,reg=0.01", "antipasto:r=8", "full"]
TWO = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TWO += ["--dynamo_backend", "no", "--main_process_port", "0", "-m"]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", *TWO]
SHARDED = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", *TWO]
LAUNCHES = {"one": [], "two": LAUNCH, "sharded": SHARDED}


def command(launch: str, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        *LAUNCHES[launch],
        "lora_lite_benchmark",
        "run",
        *options,
        "--out",
        str(out),
    ]


def run(launch: str, out: Path, *options: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(launch, out, *options),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def outs(
    arguments: list[str], files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Ten steps of every row, by one process and by two, in small forwards; batches of 5 do not
    divide by two, nor do the batches of problems.
    """
    folder = tmp_path_factory.mktemp("processes")
    options = [
        *arguments,
        "--variants",
        *ROWS,
        "--steps",
        "10",
        "--batch-size",
        "5",
        "--micro-batch-size",
        "2",
        "--lr",
        "0.003",
        "--forgetting",
        str(files["test"]),
    ]
    found = {launch: folder / launch for launch in LAUNCHES}
    for launch, out in found.items():
        done = run(launch, out, *options)
        assert done.stdout.count("| base |") == 1
    return found


def results(out: Path) -> dict[str, Result]:
    return {result.config.label: result for result in load_results(out)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_parameters_follow_one_process(outs: dict[str, Path], launch: str, row: str) -> None:
    """After ten steps with the same effective batch, every tensor agrees within a relative 1e-4,
    and so does every loss: answer tokens count the same in whichever process they are, and the
    penalty counts once.
    """
    one, two = (results(outs[name])[row] for name in ("one", launch))
    assert two.machine["processes"] == 2
    assert two.machine["sharding"] == {"two": "none", "sharded": "FSDP2"}[launch]
    assert [point.loss for point in two.curve] == pytest.approx(
        [point.loss for point in one.curve], rel=1e-4
    )
    files = [
        load_file(outs[name] / one.config.folder / "adapter.safetensors")
        for name in ("one", launch)
    ]
    for name, expected in files[0].items():
        error = (files[1][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4, name


@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_divided_evaluation_gives_the_same_outcomes(outs: dict[str, Path], launch: str) -> None:
    """Every problem is there once, in order, with the same answer and, to the last bit, the same
    loss; so is what the base makes of held-out text, below an adapter too.
    """
    one, two = (results(outs[name])["base"] for name in ("one", launch))
    assert one.test == two.test
    for row in ROWS:
        one, two = (results(outs[name])[row] for name in ("one", launch))
        assert one.forgetting is not None
        assert two.forgetting is not None
        assert one.forgetting.before == two.forgetting.before
        assert one.forgetting.after == pytest.approx(two.forgetting.after, rel=1e-3)
        assert one.test is not None
        assert two.test is not None
        assert [o.prediction for o in two.test.outcomes] == [
            o.prediction for o in one.test.outcomes
        ]
        assert [o.nats for o in two.test.outcomes] == pytest.approx(
            [o.nats for o in one.test.outcomes], rel=1e-3
        )


def test_one_process_reports(arguments: list[str], tmp_path: Path) -> None:
    """A row that fails in all processes fails once, and the next one runs; a mistake in the command
    is said once.
    """
    rows = ["lora:r=100000", "lora:r=1"]
    done = run(
        "two", tmp_path, *arguments, "--steps", "1", "--no-base", "--variants", *rows, status=1
    )
    assert done.stderr.count("lora:r=100000 (seed 0): failed: ") == 1
    assert list(results(tmp_path)) == ["lora:r=1"]
    done = run("two", tmp_path, *arguments, "--variants", "lorra", status=2)
    assert done.stderr.lower().count("did you mean 'lora'") == 1


def test_more_processes_than_rows_are_refused(arguments: list[str], tmp_path: Path) -> None:
    """A process without a row of the batch would only wait; the error says what to change."""
    done = run(
        "two",
        tmp_path,
        *arguments,
        "--batch-size",
        "1",
        "--no-base",
        "--variants",
        "lora",
        status=1,
    )
    assert "2 processes cannot share a batch_size of 1" in done.stderr


@pytest.mark.parametrize(
    ("environment", "changes", "says"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({"FSDP_VERSION": "2"}, {"quantization": "nf4"}, "'nf4' cannot be sharded"),
        ({"FSDP_VERSION": "2"}, {"implementation": "peft"}, "PEFT"),
    ],
)
def test_what_is_not_done_in_shards_is_refused(
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    changes: dict[str, Any],
    says: str,
) -> None:
    """What the launcher was told is done, or refused before the base is loaded."""
    config = make_config("lora").model_copy(update=changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BenchmarkError, match=says):
        refuse_unshardable(config)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the launcher's children in /proc")
@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_two_killed_processes_end_in_the_same_bits(
    arguments: list[str], tmp_path: Path, launch: str
) -> None:
    """Both go on from the main one's checkpoint, each with its own dropout; fewer processes than
    before are refused.
    """
    options = [
        *arguments,
        "--no-base",
        "--variants",
        "lora:dropout=0.3",
        "--steps",
        "60",
        "--checkpoint-every",
        "2",
    ]
    run(launch, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    launcher = subprocess.Popen(
        command(launch, out, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list(out.glob("*/checkpoint.pt")) and launcher.poll() is None:
        time.sleep(0.005)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (
                str(out).encode() in process.read_bytes()
                and int(process.parent.name) != launcher.pid
            ):
                os.kill(int(process.parent.name), signal.SIGKILL)
    assert launcher.wait() != 0
    assert not list(out.glob("*/result.json"))
    refused = run("one", out, *options, status=1)
    assert "was written by 2 processes, and this run has 1" in refused.stderr
    run(launch, out, *options)
    files = [
        next(tmp_path.glob(f"{name}/*/adapter.safetensors")).read_bytes()
        for name in ("whole", "killed")
    ]
    assert files[0] == files[1]


def test_gradients_are_added_up(tmp_path: Path) -> None:
    """A parameter without a gradient in one process gets the other's; without one in both it keeps
    none.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import json, torch\n"
        "from accelerate import Accelerator\n"
        "from lora_lite_benchmark.processes import divided, on_main, stop, sum_gradients\n"
        "a = Accelerator(cpu=True)\n"
        "p = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]\n"
        "p[0].grad = torch.full((2, 3), 1.0 + a.process_index)\n"
        "p[1].grad = torch.ones(2, 3) if a.process_index else None\n"
        "loss = sum_gradients(0.5, p, a)\n"
        "rows = divided([[2, 0], [1], [3]], lambda rows: [10 * row for row in rows], a, '')\n"
        "try:\n"
        "    on_main(a, lambda: 1 / 0)\n"
        "except Exception as error:\n"
        "    raised = type(error).__name__\n"
        "found = [loss, [None if q.grad is None else q.grad.tolist() for q in p], rows, raised]\n"
        f"open(r'{tmp_path}/' + str(a.process_index), 'w').write(json.dumps(found))\n"
        "stop()\n"
    )
    launch = [sys.executable, "-m", *LAUNCH[:-1], str(script)]
    subprocess.run(
        launch,
        check=True,
        capture_output=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: list[Any] = [json.loads((tmp_path / str(index)).read_text()) for index in range(2)]
    for index, raised in enumerate(("ZeroDivisionError", "BenchmarkError")):
        three, one = torch.full((2, 3), 3.0).tolist(), torch.ones(2, 3).tolist()
        assert found[index] == [1.0, [three, one, None], [0, 10, 20, 30], raised]
