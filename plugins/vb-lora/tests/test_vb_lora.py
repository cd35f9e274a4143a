"""VB-LoRA: agreement with PEFT, the published counts, what does not fit, and half precision."""

from __future__ import annotations

from collections.abc import Callable

import lora_lite as ll
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")


def test_agrees_with_peft(tiny_llama: Callable[..., nn.Module]) -> None:
    """With the same bank and logits: the same logits and gradients, on layers of two shapes."""
    model, other = tiny_llama(), tiny_llama()
    config = peft.VBLoRAConfig(
        r=3, num_vectors=10, vector_length=8, topk=2, target_modules=["q_proj", "down_proj"]
    )
    theirs = peft.get_peft_model(other, config).eval()
    adapter = ll.attach(
        model, "vb_lora", r=3, vectors=10, length=8, k=2, targets=r"(q_proj|down_proj)$"
    )
    named = dict(theirs.named_parameters())
    (bank,) = (p for name, p in named.items() if "vector_bank" in name)
    pairs = {}
    for key, parameter in adapter.named_parameters():
        path, _, name = key.rpartition(".")
        shared = key.startswith("shared:")
        pairs[key] = bank if shared else named[f"base_model.model.{path}.vblora_{name}.default"]
        parameter.data.copy_(pairs[key])
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    ours, expected = model(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        size = pairs[key].grad.abs().max()
        torch.testing.assert_close(parameter.grad, pairs[key].grad, rtol=0, atol=1e-5 * float(size))


def test_published_counts() -> None:
    """RoBERTa-base: 90 vectors of 256 and r = 4 on the 24 query and value layers, while training:
    the bank once, and 90 logits for each part.
    """
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(768, 768) for _ in range(24)])
    found = ll.plan(model, "vb_lora", targets=r"\d+", vectors=90)
    parts = 24 * 4 * (3 + 3)
    assert found.parameters == 90 * 256 + parts * 90
    assert found.shared_parameters == 90 * 256 == 23_040
    assert found.macs_per_token == 24 * 4 * (768 + 768)


def test_refuses_a_length_that_does_not_divide() -> None:
    """The error says which side of which layer, before anything is changed."""
    model = nn.ModuleList([nn.Linear(24, 16)])
    with pytest.raises(ll.LoraLiteError, match=r"0 \(24 -> 16\).*length.*divide d_in = 24"):
        ll.attach(model, "vb_lora", length=16, targets=r"0")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("vb_lora", length=8)
