"""IA3: both gates, their default layers on real architectures, and agreement with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_ia3 import IA3, IA3FF
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2]])


def test_output_gates_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same gates on keys and values give PEFT's logits and gradients."""
    equals_peft(
        IA3(),
        lambda sites: peft.IA3Config(target_modules=sites, feedforward_modules=[]),
        {"e": theirs("ia3_l.default", shape=lambda e: e[:, None], offset=1.0)},
        targets=r"(k|v)_proj$",
    )


def test_input_gates_equal_pefts(equals_peft: Callable[..., None], theirs: Any) -> None:
    """The same gates on the hidden activations give PEFT's logits and gradients."""
    equals_peft(
        IA3FF(),
        lambda sites: peft.IA3Config(target_modules=sites, feedforward_modules=sites),
        {"e": theirs("ia3_l.default", shape=lambda e: e[None], offset=1.0)},
        targets=r"down_proj$",
    )


def test_both_together_equal_pefts_single_adapter(
    biased_llama: Callable[[bool, torch.dtype], nn.Module], tmp_path: Path
) -> None:
    """ia3 and ia3_ff under two names are PEFT's one adapter with both sets, also after loading."""
    ours, base = biased_llama(True, torch.float64), biased_llama(True, torch.float64)
    parts = [
        ll.attach(ours, variant, name=variant, dtype=torch.float64) for variant in ("ia3", "ia3_ff")
    ]
    names = [[site.rsplit(".", 1)[1] for site in part.sites] for part in parts]
    assert [set(n) for n in names] == [{"k_proj", "v_proj"}, {"down_proj"}]
    feed_forward = list(parts[1].sites)
    config = peft.IA3Config(
        target_modules=[*parts[0].sites, *feed_forward], feedforward_modules=feed_forward
    )
    other = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double().eval()
    named = dict(other.named_parameters())
    for part in parts:
        for name, e in part.named_parameters():
            with torch.no_grad():
                e.normal_()
                named[f"base_model.model.{name.removesuffix('.e')}.ia3_l.default"].view(-1).copy_(
                    1 + e
                )
    expected = other(input_ids=TOKENS).logits
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, rtol=1e-10, atol=1e-10)
    for part in parts:
        part.save(tmp_path / part.name)
        part.detach()
    for name in ("ia3_ff", "ia3"):
        ll.load(ours, tmp_path / name, name=name)
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, rtol=1e-10, atol=1e-10)


LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = LLAMA
NAMES = {
    "Llama": (LLAMA, {"k_proj", "v_proj"}, {"down_proj"}),
    "Qwen2": ({**LLAMA, "num_key_value_heads": 2}, {"k_proj", "v_proj"}, {"down_proj"}),
    "Gemma": (
        {**LLAMA, "head_dim": 8, "num_key_value_heads": 2},
        {"k_proj", "v_proj"},
        {"down_proj"},
    ),
    "Phi": ({**LLAMA}, {"k_proj", "v_proj"}, {"fc2"}),
    "OPT": (
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
        {"k_proj", "v_proj"},
        {"fc2"},
    ),
    "T5": (
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        {"k", "v"},
        {"wo"},
    ),
    "Bert": (BERT, {"key", "value"}, {"dense"}),
    "Roberta": (BERT, {"key", "value"}, {"dense"}),
    "DistilBert": (
        {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        {"k_lin", "v_lin"},
        {"lin2"},
    ),
    "GPT2": ({"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}, None, {"c_proj"}),
    "GPTNeoX": (LLAMA, None, {"dense_4h_to_h"}),
    "Bloom": (
        {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        None,
        {"dense_4h_to_h"},
    ),
}


@pytest.mark.parametrize("family", NAMES)
def test_default_layers_of_real_architectures(family: str) -> None:
    """Keys and values, and the second feed-forward projection of every block, and nothing else.

    A model whose keys are fused with its queries has no default, and says so.
    """
    config, attention, feed_forward = NAMES[family]
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(
            getattr(transformers, f"{family}Config")(**config)
        )
    hidden = {p.layer.d_in for p in ll.plan(model, "ia3_ff").placements}
    assert suffixes(ll.plan(model, "ia3_ff")) == feed_forward
    assert 16 not in hidden  # never an attention output: all of those are as wide as the model
    if attention is None:
        with pytest.raises(ll.TargetError, match="matches none of these layers"):
            ll.plan(model, "ia3")
    else:
        assert suffixes(ll.plan(model, "ia3")) == attention


def suffixes(plan: ll.Plan) -> set[str]:
    """The last parts of the sites' paths."""
    return {p.path.rsplit(".", 1)[-1] for p in plan.placements}


def test_published_parameter_counts(qwen_down_proj: nn.Module) -> None:
    """On a 0.8B Qwen3.5, 0.006M on 6 k_proj and v_proj, 0.086M on the 24 down_proj; no MACs."""
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict({name: nn.Linear(1024, 512, bias=False) for name in ("k_proj", "v_proj")})
            for _ in range(6)
        ]
    attention, feed_forward = (
        ll.plan(nn.ModuleList(blocks), "ia3"),
        ll.plan(qwen_down_proj, "ia3_ff"),
    )
    assert attention.parameters == 12 * 512 == 6_144
    assert feed_forward.parameters == 24 * 3584 == 86_016
    assert attention.macs_per_token == feed_forward.macs_per_token == 0


def test_decay_pulls_the_gates_to_one() -> None:
    """The offset is stored, so weight decay brings back the base, and switches nothing off."""
    model, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5)
    before = model(x)
    adapter = ll.attach(model, "ia3", targets="0")
    for e in adapter.parameters():
        nn.init.normal_(e)
    optimizer = torch.optim.SGD(adapter.param_groups(weight_decay=0.5), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (0 * model(x)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(x), before)


def test_there_are_no_fields() -> None:
    """A field is refused by name."""
    with pytest.raises(ll.FieldError, match=r"'ia3': there is no field 'r'\. It has no fields"):
        ll.plan(nn.Sequential(nn.Linear(5, 3)), "ia3", targets="0", r=8)
