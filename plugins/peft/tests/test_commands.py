"""The command line on folders of PEFT: inspect, and the progress of an export."""

import json
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite.cli import main
from torch import nn

Make = Callable[..., nn.Module]


def test_inspect(tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise: type, settings and layers of a folder are shown, without a model."""
    recipe = {"q_proj": ("lora", {"r": 2}), r"model\.norm$": "full"}
    with pytest.warns(ll.AdapterWarning, match="trained whole"):
        ll.attach(tiny_llama(), recipe).save(tmp_path / "out", format="peft")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "PEFT         LORA, written by version unknown"
    assert lines[1] == "base         unknown"
    assert lines[2] == "tensors      5, 144 numbers: float32"
    assert "r=2, " in lines[3]
    assert "modules_to_save=['model.norm']" in lines[3]
    path = "model.layers.0.self_attn.q_proj"
    assert f"  {path}: lora_A.weight [2, 16], lora_B.weight [16, 2]" in lines
    assert "  model.norm: weight [16]" in lines


def test_inspect_of_a_bad_folder(
    tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ll.attach(tiny_llama(), "lora", r=2).save(tmp_path / "out", format="peft")
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps([]))
    assert main(["inspect", str(tmp_path / "out")]) == 1
    assert "does not hold a JSON object" in capsys.readouterr().err


def test_progress(tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise: work of many layers is told at each tenth, on standard error."""
    model = tiny_llama(num_hidden_layers=5)
    model.save_pretrained(tmp_path / "base")
    adapter = ll.attach(model, "pissa", r=2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    adapter.save(tmp_path / "a.safetensors")
    options = ["--base", str(tmp_path / "base"), "--format", "peft", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "a.safetensors"), *options]) == 0
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if "of 35 layers" in line]
    assert len(told) == 10
    assert told[-1] == "lora-lite: 35 of 35 layers"
    assert captured.out == f"wrote {tmp_path / 'out'}\n"
