"""A merged checkpoint from a base on disk: the same files, without the model in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite.cli import main
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")

Make = Callable[..., nn.Module]

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
METHODS: list[tuple[Any, dict[str, Any]]] = [
    ("lora", {"r": 2, "targets": r"_proj$"}),
    ("dora", {"r": 2}),
    ("road", {"group_size": 4}),
    ("pissa", {"r": 2, "targets": r"[qv]_proj$"}),
    ({"q_proj": ("lora", {"r": 2}), "norm$": "full", "v_proj": ("full", {"only": "bias"})}, {}),
]


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def saved(model: nn.Module, path: Path, method: Any, **options: Any) -> Path:
    """The file of an adapter with random tensors, as of training."""
    adapter = ll.attach(model, method, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    adapter.scale = 1.0 if isinstance(method, dict) else 0.5
    adapter.save(path, derived=method != "pissa")
    adapter.detach()
    return path


def export(file: Path, base: Path, out: Path, *settings: str) -> int:
    arguments = ["--base", str(base), "--format", "merged", *settings, str(out)]
    return main(["export", str(file), *arguments])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda given: str(given)[:20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["biased", "many shards", "gpt2"])
def test_the_same_as_from_memory(
    tiny_llama: Make,
    tiny_gpt2: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    dtype: torch.dtype,
    method: Any,
    options: dict[str, Any],
) -> None:
    """Promise: bit for bit what merging in memory writes, in the base's own files and names."""
    if family == "gpt2":
        if isinstance(method, dict):
            pytest.skip("GPT-2 has other names")
        model = tiny_gpt2()
        options = {**options, "targets": r"c_attn$|mlp\.c_proj$"}
    else:
        model = tiny_llama(attention_bias=True, mlp_bias=True)
    model = model.to(dtype)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="6KB" if family == "many shards" else "1GB")
    (base / "tokenizer.json").write_text("{}")
    file = saved(loaded(base), tmp_path / "adapter.safetensors", method, **options)
    assert export(file, base, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "layers, one at a time" in said
    assert said.count("layers merged") == len(list(base.glob("*.safetensors")))
    assert export(file, base, tmp_path / "whole", "--set", "shard_bytes=1000000") == 0
    from_disk, whole = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert from_disk.keys() == whole.keys() == tensors_of(base).keys()
    assert all(torch.equal(from_disk[name], tensor) for name, tensor in whole.items())
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    adapted = loaded(base)
    ll.load(adapted, file)
    found, expected = logits(loaded(tmp_path / "out")), logits(adapted)
    assert float((found - expected).abs().max() / expected.abs().max()) < (
        1e-5 if dtype == torch.float32 else 0.1
    )


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"tie_word_embeddings": True}, {"targets": "lm_head", "exclude": ()}, "lm_head.weight"),
        ({"tie_word_embeddings": True}, {"targets": "embed_tokens"}, "are one weight"),
    ],
)
def test_a_tied_weight_is_merged_in_memory(
    tiny_llama: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    options: dict[str, Any],
    reason: str,
) -> None:
    """Promise: what cannot be done a layer at a time is done as before, and why is said."""
    base = tmp_path / "base"
    tiny_llama(**changes).save_pretrained(base)
    file = saved(loaded(base), tmp_path / "adapter.safetensors", "lora", r=2, **options)
    assert export(file, base, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "has to be in memory" in said
    assert reason in said
    adapted = loaded(base)
    ll.load(adapted, file)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(adapted), rtol=1e-4, atol=1e-5
    )


def test_published_names_of_experts_are_merged_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise: experts that the checkpoint keeps one by one are merged all the same."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "base")
    file = saved(model, tmp_path / "adapter.safetensors", "lora", r=2, targets=r"experts\.")
    assert export(file, tmp_path / "base", tmp_path / "out") == 0
    assert "has to be in memory" in capsys.readouterr().err
    ll.load(model, file)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-5
    )


def test_experts_in_one_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise: experts that the checkpoint keeps as the model does are merged from disk."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, head_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "base")
    targets = r"experts\.\w+_proj$"
    file = saved(model, tmp_path / "adapter.safetensors", "lora", r=2, targets=targets)
    assert export(file, tmp_path / "base", tmp_path / "out") == 0
    assert "merging 4 layers, one at a time" in capsys.readouterr().err
    base = logits(model)
    ll.load(model, file)
    assert float((logits(model) - base).abs().max()) > 1e-3
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-5
    )


# --- what goes wrong


def test_mistakes_leave_nothing(
    tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise: another base, a truncated one, and a folder that is there: an error, no folder."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base, max_shard_size="6KB")
    file = saved(loaded(base), tmp_path / "a.safetensors", "pissa", r=2, targets=r"[qv]_proj$")

    other = tmp_path / "other"
    model = loaded(base)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(1)  # type: ignore[union-attr,operator]
    model.save_pretrained(other, max_shard_size="6KB")
    assert export(file, other, tmp_path / "out") == 1
    assert f"{file} was made on a base with other weights" in capsys.readouterr().err

    first = sorted(base.glob("*.safetensors"))[-1]
    whole = first.read_bytes()
    first.write_bytes(whole[:-40])
    assert export(file, base, tmp_path / "out") == 1
    assert "is damaged: it has" in capsys.readouterr().err
    first.write_bytes(whole)
    assert not (tmp_path / "out").exists()

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert export(file, base, tmp_path / "out") == 1
    assert "is there already" in capsys.readouterr().err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.safetensors", "base", "other", "out"]


LIMITED = """
import resource, signal, sys
from lora_lite.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    """Promise: where a file cannot grow, as on a full disk, no folder is left that loads."""
    base = tmp_path / "base"
    tiny_llama(hidden_size=64, intermediate_size=96).save_pretrained(base)
    file = saved(loaded(base), tmp_path / "adapter.safetensors", "lora", r=2)
    size = (base / "model.safetensors").stat().st_size
    arguments = ["export", str(file), "--base", str(base), "--format", "merged"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size // 2), *arguments, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


MEASURED = """
import sys, transformers
import lora_lite.cli
from transformers import LlamaForCausalLM

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
status = lora_lite.cli.main(sys.argv[1:])
print("grown", peak() - before)
sys.exit(status)
"""


# glibc returns what is freed at once, so that the peak is what the code holds, and not the holes
# that earlier tensors left: these were 70 to 150 MB from run to run.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
@pytest.mark.parametrize("shards", ["1GB", "10MB"])
def test_the_model_is_not_in_memory(tmp_path: Path, shards: str) -> None:
    """Promise: the peak is a layer's, whatever the size of model and shards: a small part of the
    checkpoint, while loading it takes all of it and more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert size > 300e6
    file = saved(model, tmp_path / "adapter.safetensors", "lora", r=4, targets=r"[qv]_proj$|down")
    del model
    grown = {}
    for out, settings in (("disk", []), ("memory", ["--set", "shard_bytes=10000000"])):
        arguments = ["--base", str(tmp_path / "base"), "--format", "merged", *settings]
        done = subprocess.run(
            [
                *(sys.executable, "-c", MEASURED, "export", str(file), *arguments),
                str(tmp_path / out),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **GIVES_BACK},
        )
        assert done.returncode == 0, done.stderr
        grown[out] = int(done.stdout.split("grown")[1])
    print(json.dumps({"checkpoint": size, **grown}))
    assert grown["disk"] < size * 0.4
    assert grown["memory"] > size * 0.9
