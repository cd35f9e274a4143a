"""A disk that is full: an error, no half file, and the file before is untouched."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
from torch import nn

WRITER = """
import resource, signal, sys, torch, lora_lite as ll
from transformers import LlamaConfig, LlamaForCausalLM
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
adapter = ll.attach(model, "lora", r=8)
for parameter in adapter.parameters():
    torch.nn.init.normal_(parameter)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    adapter.save(sys.argv[1], format="gguf")
except ll.AdapterFileError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk(tiny_llama: Callable[..., nn.Module], tmp_path: Path, is_there: bool) -> None:
    file = tmp_path / "a.gguf"
    if is_there:
        ll.attach(tiny_llama(), "lora", r=2).save(file, format="gguf")
    before = file.read_bytes() if is_there else b""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(file)], capture_output=True, text=True, check=True
    )
    assert "a.gguf cannot be written" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == (["a.gguf"] if is_there else [])
    if is_there:
        assert file.read_bytes() == before
