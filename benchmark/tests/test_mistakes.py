"""What the command says when something is wrong: one line that names it, and a status."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.results import load_results
from lora_lite_benchmark.run import run_one


def test_a_failing_row_does_not_stop_the_others(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that fits no layer is reported in a line, its traceback kept; the next row still runs;
    the exit code is 1.
    """
    rows = ["lora:r=100000", "lora:r=1"]
    assert main(["run", *arguments, "--out", str(tmp_path), "--no-base", "--variants", *rows]) == 1
    captured = capsys.readouterr()
    assert "lora:r=100000 (seed 0): failed: " in captured.err
    assert "1 of 2 runs failed" in captured.err
    assert "Traceback" not in captured.err
    assert "lora:r=1 (seed 0): " in captured.out
    assert "Traceback" in next(tmp_path.glob("*/error.txt")).read_text()
    assert [result.config.label for result in load_results(tmp_path)] == ["lora:r=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "lorra"], "(?i)did you mean 'lora'"),
        (["--set", "rank=2", "--variants", "lora"], "there is no field 'rank'"),
        (["--set", "r", "--variants", "lora"], "'r' in --set is not an assignment"),
        (["--preset", "big"], "preset 'big' does not exist. The presets are "),
        (["--steps", "many"], "setting steps of the row 'base' is 'many'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    """What was asked for wrongly is said before anything runs: no traceback, exit code 2."""
    assert main(["run", *arguments, "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_problems_are_read_before_training(
    make_config: Callable[..., RunConfig], files: dict[str, Path], tmp_path: Path
) -> None:
    """A set of problems that does not exist ends a run at once, and not after hours of training."""
    beyond = {"path": str(files["train"]), "start": 900}
    config = make_config("lora", validation=beyond, checkpoint_every=1)
    with pytest.raises(BenchmarkError, match="no rows from number 900 on"):
        run_one(config, tmp_path)
    assert not list(tmp_path.rglob("checkpoint.pt"))


@pytest.mark.parametrize("missing", ["--model", "--test"])
def test_a_missing_path_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """A path that does not exist is named by every run that needs it, in a line each."""
    options = [
        *arguments,
        missing,
        str(tmp_path / "absent.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--variants",
        "lora",
    ]
    assert main(["run", *options]) == 1
    assert f"{tmp_path}/absent.jsonl" in capsys.readouterr().err


def test_a_directory_without_results_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`table` of an empty directory names the directory and the command that fills it."""
    assert main(["table", str(tmp_path)]) == 2
    assert f"lora-lite-bench run --out {tmp_path}" in capsys.readouterr().err
