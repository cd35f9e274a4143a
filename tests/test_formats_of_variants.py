"""Every installed variant, in every format: the same logits elsewhere, or a refusal by name.

The models have biases, a tied head, or experts, in float32 and bfloat16. An adapter is written as a
folder of PEFT, plain and in PEFT's own types, and as a merged checkpoint; PEFT and transformers
load them, and so does lora-lite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite.plugins import variant_class
from torch import Tensor, nn

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2]])
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
# Of logits, relative to the largest.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.3}
LINEAR, EXPERTS = r"(q|v)_proj$|down_proj$", r"q_proj$|experts\.\w+_proj$"
# What these need beside their defaults, on layers as small as these.
FIELDS: dict[str, dict[str, Any]] = {"road": {"group_size": 4}, "antipasto_mix": {"k": 2}}
TARGETS = {"tokens": r"embed_tokens|lm_head", "full": r"q_proj$|model\.norm$|lm_head"}


def llama(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **config))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "biased": (lambda: llama(attention_bias=True, mlp_bias=True), LINEAR),
    "tied": (lambda: llama(tie_word_embeddings=True), LINEAR),
    "gpt-oss": (gpt_oss, EXPERTS),
    "mixtral": (mixtral, EXPERTS),
}


def made(family: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found.double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def attached(model: nn.Module, name: str, targets: str) -> ll.Adapter:
    """An adapter with random tensors, as of training."""
    fields = {"r": 4} if "r" in variant_class(name).model_fields else {}
    options = {**fields, **FIELDS.get(name, {}), "targets": TARGETS.get(name, targets)}
    batches = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
    try:
        adapter = ll.attach(model, name, exclude=(), **options)
    except ll.CalibrationError:
        adapter = ll.attach(model, name, exclude=(), calibration=batches, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng).to(parameter))
            if name == "antipasto_ablate":
                parameter.abs_()
    adapter.project()
    return adapter


def elsewhere(family: str, dtype: torch.dtype, folder: Path, how: str) -> list[nn.Module]:
    """The models that a program without this adapter makes of what was written."""
    from transformers import AutoModelForCausalLM

    if how == "merged":
        return [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()]
    here = made(family, dtype)
    ll.load(here, folder)
    return [here, peft.PeftModel.from_pretrained(made(family, dtype), folder).eval()]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(ll.variants()))
def test_the_same_logits_or_a_refusal(
    tmp_path: Path, name: str, family: str, dtype: torch.dtype
) -> None:
    """Promise: nothing that is written is another adapter than the one in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made(family, dtype)
        base = logits(model)
        try:
            adapter = attached(model, name, FAMILIES[family][1])
        except (ll.TargetError, ll.MisfitError, ll.FieldError) as error:
            pytest.skip(f"it does not go there: {str(error)[:60]}")
        ours = logits(model)
        assert dtype == torch.bfloat16 or relative(base, ours) > 1e-3
        written = 0
        for how, options in (("peft", {}), ("peft", {"native": True}), ("merged", {})):
            folder = tmp_path / f"{how}{len(options)}"
            try:
                adapter.save(folder, format=how, **options)
            except ll.AdapterError:
                assert not folder.exists()
                continue
            written += 1
            for other in elsewhere(family, dtype, folder, how):
                assert relative(logits(other), ours) < TOLERANCES[dtype], (how, options)
    shifts = variant_class(name).acts_on_bias
    assert written or shifts, "a method that shifts no output can always be merged"
