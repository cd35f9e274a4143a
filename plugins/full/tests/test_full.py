"""What is special to `full`: its formula on every kind of layer, heads and norms beside LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_full import Full
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("lora_lite_lora")

Make = Callable[..., nn.Module]

MODULES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(6, 4), torch.randn(3, 6)),
    "Conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)),
    "grouped Conv1d": lambda: (nn.Conv1d(4, 4, 3, groups=2), torch.randn(2, 4, 6)),
    "Embedding": lambda: (nn.Embedding(9, 4), torch.randint(9, (2, 5))),
    "Embedding with max_norm": lambda: (
        nn.Embedding(9, 4, max_norm=100.0),
        torch.randint(9, (2, 5)),
    ),
    "LayerNorm": lambda: (nn.LayerNorm(6), torch.randn(3, 6)),
    "RMSNorm": lambda: (nn.RMSNorm(6), torch.randn(3, 6)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 4), torch.randn(3, 4, 5)),
    "PReLU": lambda: (nn.PReLU(4), torch.randn(3, 4)),
}


def trained(adapter: ll.Adapter) -> dict[str, Tensor]:
    """Give every parameter other values; what they are then, by name."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng).to(parameter))
    return {key: parameter.detach().clone() for key, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_the_output_is_the_modules_own_with_new_parameters(name: str) -> None:
    """The definition: M(x; θ') for every kind of layer; nothing at the start; gradients of θ'."""
    module, x = MODULES[name]()
    model = nn.Sequential(module).double()
    x = x.double() if x.is_floating_point() else x
    before = model(x)
    adapter = ll.attach(model, "full", targets="0", dtype=torch.float64)
    assert torch.equal(model(x), before)
    values = trained(adapter)
    after = model(x)
    weights = torch.randn(after.shape, dtype=torch.float64)
    (after * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    adapter.detach()
    assert torch.equal(model(x), before)
    own = dict(model.named_parameters())
    assert values.keys() == own.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            laid_out = values[key].T if name == "Embedding" else values[key]
            parameter.copy_(laid_out.reshape(parameter.shape))
    expected = model(x)
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)
    (expected * weights).sum().backward()
    for key, parameter in own.items():
        got = gradients[key]
        assert got is not None
        got = got.T if name == "Embedding" else got
        assert parameter.grad is not None
        torch.testing.assert_close(
            got.reshape(parameter.shape), parameter.grad, rtol=1e-10, atol=1e-10
        )


def test_nothing_decays() -> None:
    """Weight decay would pull to 0, and not to the base."""
    adapter = ll.attach(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "full", targets=".")
    (group,) = adapter.param_groups(weight_decay=0.1)
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 4


def test_biases_alone() -> None:
    """`only="bias"`: of linear layers and norms alike; a layer without a bias is named."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    x = torch.randn(2, 4)
    with pytest.raises(ll.MisfitError, match=r"2 \(4 -> 4\): full: only: there is no 'bias' here"):
        ll.attach(model, Full(only="bias"), targets=".")
    adapter = ll.attach(model, Full(only="bias"), targets="0|1")
    values = trained(adapter)
    assert set(values) == {"0.bias", "1.bias"}
    after = model(x)
    adapter.detach()
    model.load_state_dict(values, strict=False)
    torch.testing.assert_close(model(x), after)


def test_it_takes_the_norms_and_routers_of_a_pattern() -> None:
    """A pattern for a part of the model takes all of its layers, whatever they are."""
    model = tiny("llama")
    paths = [p.path for p in ll.plan(model, "full", targets=r"layers\.0\.").placements]
    assert "model.layers.0.input_layernorm" in paths
    assert "model.layers.0.mlp.up_proj" in paths
    assert len(paths) == 9


def test_fused_experts_are_trained_as_a_whole() -> None:
    """Of a mixture, all experts of a block are one module, which returns one tensor."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    if not hasattr(model.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this version of transformers has a layer for each expert")
    ids = torch.randint(32, (2, 6))
    before = model(input_ids=ids).logits
    adapter = ll.attach(model, "full", targets=r"experts$")
    assert torch.equal(model(input_ids=ids).logits, before)
    values = trained(adapter)
    after = model(input_ids=ids).logits
    adapter.detach()
    model.load_state_dict(values, strict=False)
    torch.testing.assert_close(model(input_ids=ids).logits, after)


# --- the head of a classifier


def tiny(family: str, seed: int = 0) -> nn.Module:
    """A sequence classifier whose base is always the same, and whose head `seed` draws."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model: nn.Module
    if family == "llama":
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
        head = model.score
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        head = model.classifier
    torch.manual_seed(seed)
    nn.init.normal_(head.weight)
    return model.eval()


RECIPES: dict[str, dict[str, Any]] = {
    "llama": {r"(q|v)_proj$": ("lora", {"r": 2}), r"score$": "full", r"norm$": "full"},
    "bert": {
        r"(query|value)$": ("lora", {"r": 2}),
        r"(classifier|pooler\.dense)$": "full",
        r"LayerNorm$": "full",
    },
}


@pytest.mark.parametrize("family", RECIPES)
def test_a_classifier_comes_back_onto_another_random_head(family: str, tmp_path: Path) -> None:
    """LoRA, the head and the norms, trained by Trainer: one file gives back the logits.

    Nothing is said about another base, although the head there is another one.
    """
    pytest.importorskip("accelerate")
    model = tiny(family, seed=1)
    adapter = ll.attach(model, RECIPES[family])
    data = [
        {"input_ids": torch.randint(1, 32, (6,)), "labels": torch.tensor(label % 3)}
        for label in range(12)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    values = dict(adapter.named_parameters())
    head = values["score.weight" if family == "llama" else "classifier.weight"]
    start = head.detach().clone()
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(head, start)
    adapter.save(tmp_path / "adapter")
    model.eval()
    ids = torch.randint(1, 32, (4, 6))
    expected = model(input_ids=ids).logits

    other = tiny(family, seed=2)
    assert float((other(input_ids=ids).logits - expected).detach().abs().max()) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_another_base_is_still_seen(tmp_path: Path) -> None:
    """The head does not count, and LoRA's layers do."""
    model = tiny("llama")
    adapter = ll.attach(model, RECIPES["llama"])
    trained(adapter)
    adapter.save(tmp_path / "adapter")
    other = tiny("llama", seed=2)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.q_proj.weight.add_(1.0)
    with pytest.warns(ll.AdapterWarning, match="other weights: 2 of 4 layers"):
        ll.load(other, tmp_path / "adapter")


def test_the_recipe_silences_the_warning_of_a_frozen_head() -> None:
    """Without the head in it, attach names it; with it, attach says nothing."""
    with pytest.warns(ll.AdapterWarning, match=r"stay frozen(?s:.*)score"):
        ll.attach(tiny("llama"), "lora", targets="q_proj$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.attach(tiny("llama"), RECIPES["llama"])


def test_a_head_of_several_layers_is_chosen_by_what_is_inside_it() -> None:
    """The head of RoBERTa is a module of two layers: its own path names no layer."""
    config = transformers.RobertaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.RobertaForSequenceClassification(config)
    with pytest.raises(ll.TargetError) as caught:
        ll.plan(model, {"query$": "lora", r"classifier$": "full"})
    assert list(caught.value.layers) == ["classifier.dense", "classifier.out_proj"]
    assert r"write 'classifier\\.'" in str(caught.value)
    plan = ll.plan(model, {"query$": ("lora", {"r": 2}), r"classifier\.": "full"})
    assert [p.path for p in plan.placements][1:] == caught.value.layers


@pytest.mark.parametrize("kind", ["reward", "tokens"])
def test_reward_models_and_token_classifiers(kind: str, tmp_path: Path) -> None:
    """A head of one output, and a head for every token, are heads like any other."""
    config = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "num_labels": 1 if kind == "reward" else 5,
    }

    def make(seed: int) -> nn.Module:
        torch.manual_seed(0)
        if kind == "reward":
            model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config))
        else:
            model = transformers.LlamaForTokenClassification(transformers.LlamaConfig(**config))
        torch.manual_seed(seed)
        nn.init.normal_(model.score.weight)
        made: nn.Module = model.eval()
        return made

    ids = torch.randint(1, 32, (2, 6))
    model = make(1)
    adapter = ll.attach(model, {"q_proj$": ("lora", {"r": 2}), "score$": "full"})
    trained(adapter)
    adapter.save(tmp_path / "adapter")
    other = make(2)
    ll.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits)
