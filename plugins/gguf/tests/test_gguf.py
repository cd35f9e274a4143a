"""GGUF files: names, order of rows and numbers as llama.cpp's converter would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., nn.Module]


def adapted(model: nn.Module, name: str = "lora", **options: Any) -> ll.Adapter:
    """An adapter with random tensors, as of training."""
    arguments: dict[str, Any] = {"targets": r"_proj$|c_attn$|c_fc$|c_proj$", **options}
    adapter = ll.attach(model, name, **arguments)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return adapter


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a file, by the reader of the package gguf."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {each.name: torch.tensor(each.data) for each in reader.tensors}
    return fields, tensors


def in_gguf_order(w: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's converter has them: of each head 0, h, 1, h + 1, …"""
    size = len(w) // heads
    order = [
        head * size + offset + half * size // 2
        for head in range(heads)
        for offset in range(size // 2)
        for half in (0, 1)
    ]
    return w[order]


@pytest.mark.parametrize("name", ["lora", "antipasto"])
def test_a_llama(tiny_llama: Make, tmp_path: Path, name: str) -> None:
    """B A is the change of the converted weight: queries and keys interleaved, all else as it is.

    The model has fewer heads for keys than for queries.
    """
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=2)
    adapter = adapted(model, name, r=4)
    adapter.scale = 0.5
    adapter.save(tmp_path / "a.gguf", format="gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0
    assert len(tensors) == 2 * 2 * 7
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for path, layer in adapter.merged().items():
        delta = layer.weight - adapter._modules[path].weight.detach()
        if path.endswith("q_proj"):
            delta = in_gguf_order(delta, 4)
        if path.endswith("k_proj"):
            delta = in_gguf_order(delta, 2)
        _, _, block, *rest = path.split(".")
        weight = f"blk.{block}.{names['.'.join(rest)]}.weight"
        a, b = tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"]
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b @ a, delta, rtol=1e-4, atol=1e-6)


def test_other_models_are_not_interleaved(tiny_gpt2: Make, tmp_path: Path) -> None:
    """Qwen keeps its rows; GPT-2's fused projection and Conv1D come out the usual way round."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    cases = [
        (Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)), "qwen2", "attn_q", "q_proj"),
        (tiny_gpt2(), "gpt2", "attn_qkv", "c_attn"),
    ]
    for model, architecture, theirs, ours in cases:
        adapter = adapted(model, r=2)
        adapter.save(tmp_path / "a.gguf", format="gguf")
        fields, tensors = read(tmp_path / "a.gguf")
        assert fields["general.architecture"] == architecture
        path = next(path for path in adapter.sites if path.endswith(ours))
        found = adapter.low_rank()[path]
        weight = f"blk.0.{theirs}.weight"
        b, a = tensors[f"{weight}.lora_b"], tensors[f"{weight}.lora_a"]
        torch.testing.assert_close((b @ a).double(), found.B @ found.A, rtol=1e-4, atol=1e-6)


def test_a_layer_without_a_change(tiny_llama: Make, tmp_path: Path) -> None:
    """A fresh adapter's tensors are not empty, and 0."""
    ll.attach(tiny_llama(), "lora", r=2).save(tmp_path / "a.gguf", format="gguf")
    _, tensors = read(tmp_path / "a.gguf")
    assert all(tensor.numel() > 0 for tensor in tensors.values())
    assert not any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("b"))


def test_what_is_refused(tiny_llama: Make, blocks: Make, tmp_path: Path) -> None:
    """Full rank, tied heads, unknown models: by name, and no file is left."""
    tied = tiny_llama(tie_word_embeddings=True)
    cases: list[tuple[ll.Adapter, str]] = [
        (adapted(tiny_llama(), "dora", r=2), "of full rank"),
        (adapted(tied, r=2, targets="lm_head", exclude=()), "lm_head is tied to the embeddings"),
        (ll.attach(blocks(), "lora", r=2), "type 'Blocks' cannot be written"),
    ]
    for adapter, reason in cases:
        with pytest.raises(ll.AdapterError, match=reason):
            adapter.save(tmp_path / "a.gguf", format="gguf")
    with pytest.raises(ll.AdapterFileError, match="cannot be written"):
        adapted(tiny_llama(), r=2).save(tmp_path / "no" / "a.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_said(tiny_llama: Make, tmp_path: Path) -> None:
    adapter = adapted(tiny_llama(), "dora", r=2, targets=r"v_proj$")
    with pytest.warns(ll.AdapterWarning, match="of 2 layers was truncated"):
        adapter.save(tmp_path / "a.gguf", format="gguf", rank=3)
    _, tensors = read(tmp_path / "a.gguf")
    assert {len(tensor) for name, tensor in tensors.items() if name.endswith("a")} == {3}
