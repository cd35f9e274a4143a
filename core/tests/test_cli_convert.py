"""lora-lite export and lora-lite import: a base on disk, a file, and another format."""

from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite.cli import main
from torch import nn

Make = Callable[..., nn.Module]

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2]])


@pytest.fixture
def base(tiny_llama: Make, tmp_path: Path) -> Path:
    """The directory of a model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    """An adapter's file, with random tensors as of training."""
    adapter = ll.attach(loaded(base), "pissa", r=2, targets=r"[qv]_proj$")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2)
    adapter.save(tmp_path / "adapter.safetensors", derived=False)
    return tmp_path / "adapter.safetensors"


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_export_merged(
    base: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is the adapted model; progress goes to standard error, the result to output."""
    out = tmp_path / "merged"
    arguments = ["--base", str(base), "--format", "merged", "--set", "shard_bytes=4000", str(out)]
    assert main(["export", str(file), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {out}\n"
    assert "loading" in captured.err
    assert "model-00001-of-" in captured.err
    adapted = loaded(base)
    ll.load(adapted, file)
    torch.testing.assert_close(logits(loaded(out)), logits(adapted), rtol=1e-4, atol=1e-5)


def test_export_to_peft_and_import_again(
    base: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There and back through a folder of PEFT is the same change, now a LoRA."""
    pytest.importorskip("lora_lite_peft")
    out, back = tmp_path / "peft", tmp_path / "back.safetensors"
    assert main(["export", str(file), "--base", str(base), "--format", "peft", str(out)]) == 0
    assert main(["import", str(out), "--base", str(base), str(back)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\nwrote {back}: 4 layers\n"
    before, after = loaded(base), loaded(base)
    ll.load(before, file)
    assert ll.load(after, back).variant.name == "lora"
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=1e-5)


def test_truncation_is_said_in_plain_words(
    base: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lora_lite_peft")
    arguments = ["--base", str(base), "--format", "peft", "--set", "rank=1", str(tmp_path / "out")]
    assert main(["export", str(file), *arguments]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "lora-lite: the change of 4 layers was truncated:" in lines


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "pfet"], "Did you mean 'peft'?"),
        (["--format", "merged", "--set", "shard_byte=3"], "does not take 'shard_byte'"),
        (["--format", "merged", "--set", "shard_bytes"], "is not a name=value"),
        (["--format", "merged", "--base", "/nowhere/at/all"], "cannot be read as a model"),
    ],
)
def test_mistakes(
    base: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """Status 1, the message on standard error, and nothing written."""
    out = tmp_path / "out"
    assert main(["export", str(file), "--base", str(base), *arguments, str(out)]) == 1
    assert complaint in capsys.readouterr().err
    assert not out.exists()


def test_import_of_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "nowhere"), "--base", str(base), str(tmp_path / "out")]
    assert main(["import", *arguments]) == 1
    assert "is not there" in capsys.readouterr().err
