"""The command lora-lite: variants, plan, inspect."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
from lora_lite.cli import main
from torch import nn

Make = Callable[..., nn.Module]


@pytest.fixture
def folder(tiny_llama: Make, tmp_path: Path) -> Path:
    """A directory with the configuration of a model, and no weights."""
    tiny_llama().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_variants(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists every installed variant with its distribution, version and class."""
    assert main(["variants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ll.variants())
    assert any(
        line.startswith("lora ") and "lora-lite-lora" in line and "lora_lite_lora:LoRA" in line
        for line in lines
    )


def test_plan_needs_the_configuration_alone(
    folder: Path, tiny_llama: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints what plan() says of the model, with the same choice of layers and fields."""
    options = [
        "--targets",
        "q_proj",
        "--targets",
        "down_proj",
        "--exclude",
        r"1\.self",
        "--layers",
        "0",
        "1",
    ]
    assert (
        main(["plan", str(folder), "lora", *options, "--set", "r=3", "--set", "rslora=true"]) == 0
    )
    out = capsys.readouterr().out
    expected = ll.plan(
        tiny_llama(), "lora", targets=["q_proj", "down_proj"], exclude=r"1\.self", r=3, rslora=True
    )
    assert out == f"{expected}\n"
    assert len(expected.placements) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lroa"], ("'lroa'", "'lora'")),
        (["lora", "--set", "rank=3"], ("'lora'", "'rank'")),
        (["lora", "--set", "r"], ("--set r ", "name=value")),
        (["lora", "--set", "targets=q_proj"], ("'lora'", "'targets'")),
        (["antipasto", "--set", "rotate_basis=X"], ("rotate_basis='X'",)),
        (["lora", "--targets", "nowhere"], ("targets='nowhere'", "q_proj x 2")),
        (["antipasto"], ("largest possible is 16",)),
    ],
)
def test_plan_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: tuple[str, ...]
) -> None:
    """Status 1 and the library's message on standard error, without a traceback."""
    assert main(["plan", str(folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-lite: ")
    for text in says:
        assert text in captured.err
    assert (captured.out, "Traceback" in captured.err) == ("", False)


def test_plan_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory without a model is said to be none."""
    assert main(["plan", str(tmp_path), "lora"]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path) in told
    assert "transformers" in told


def test_inspect(blocks: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows what a file holds, each set of fields with its layers, without model and plugin."""
    adapter = ll.attach(blocks(), "antipasto", r=4, seed=7, overrides={"up": {"r": 8}})
    adapter.scale = 0.5
    adapter.save(tmp_path / "full")
    adapter.save(tmp_path / "slim", derived=False)
    assert main(["inspect", str(tmp_path / "full")]) == 0
    out = capsys.readouterr().out
    for text in (
        "antipasto (format 2)",
        "lora-lite-antipasto",
        "7, 0.5",
        "in the file",
        "needed as it was",
        '"r":8',
        "blocks.0.up",
    ):
        assert text in out
    assert main(["inspect", str(tmp_path / "slim")]) == 0
    assert "left out" in capsys.readouterr().out


def test_inspect_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not an adapter, or not there, is status 1."""
    (tmp_path / "file").write_text("hello")
    for name in ("file", "nowhere"):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert str(tmp_path / name) in capsys.readouterr().err


def test_the_installed_command() -> None:
    """`lora-lite` is on the path beside Python, and its help names the commands."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lora-lite", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("variants", "plan", "inspect"):
        assert command in done.stdout
