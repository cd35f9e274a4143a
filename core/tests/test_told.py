"""Nothing fails silently: what is not applied, not trained or not saved is told, with what to do
about it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import UserDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]
TOKENS = torch.tensor([[5, 9, 3, 7, 4, 6], [8, 8, 4, 30, 6, 11]])


def told(call: Callable[[], Any]) -> list[str]:
    """The warnings of ours that a call gives; any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", ll.AdapterWarning)
        call()
    return [str(w.message) for w in caught]


def train(model: nn.Module, adapter: ll.Adapter, x: Any) -> None:
    """One step."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    output = model(**x) if isinstance(x, dict) else model(x)
    (output.loss if hasattr(output, "loss") else output.square().mean()).backward()
    optimizer.step()


def changed(adapter: ll.Adapter) -> ll.Adapter:
    """The adapter as if it had been trained."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    return adapter


# --- adapters that are not applied


class Reads(nn.Module):
    """Its second layer's weight is read, and the layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layers[0](x), self.layers[1].weight)


def test_a_site_that_is_never_called_is_told_at_the_first_training_forward() -> None:
    """Promise: the first training forward that did not call a site says so, once, with the sites
    and `exclude=`; an evaluation, which may leave parts of a model out, does not.
    """
    model = Reads()
    ll.attach(model, "lora", r=2)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert told(lambda: model(x)) == []
    assert told(lambda: model.eval()(x)) == []
    (text,) = told(lambda: model.train()(x))
    assert "layers.1" in text
    assert "layers.0" not in text
    assert "exclude=" in text
    assert told(lambda: model(x)) == []


def test_a_model_that_calls_every_site_is_not_complained_of(
    blocks: Make, tiny_llama: Make, tiny_gpt2: Make
) -> None:
    """Promise: no false alarm: not for plain models, for gradient checkpointing, several adapters,
    models in several modes, or sites that only the second forward calls."""
    x = torch.randn(3, 8)
    model = blocks()
    ll.attach(model, "lora", r=2)
    ll.attach(model, "dora", r=2, name="second", layers=1)
    assert told(lambda: [model.train()(x), model(x), model.eval()(x)]) == []
    for make in (tiny_llama, tiny_gpt2):
        transformer = make().train()
        ll.attach(transformer, "lora", r=2)
        batch = {"input_ids": TOKENS, "labels": TOKENS}
        assert told(lambda t=transformer, b=batch: t(**b).loss.backward()) == []
    checkpointed = tiny_llama().train()
    ll.attach(checkpointed, "lora", r=2)
    enable = (
        getattr(checkpointed, "activation_checkpointing_enable", None)
        or checkpointed.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    assert told(lambda: checkpointed(input_ids=TOKENS, labels=TOKENS).loss.backward()) == []


def tiny_mamba() -> nn.Module:
    """A Mamba of transformers, whose dt_proj is read and not called."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    return model


def test_mamba(tmp_path: Path) -> None:
    """Promise: the same on a real model: Mamba's dt_proj is named at the first training forward, by
    check, and when it is saved; with what the message proposes nothing is left to tell."""
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    model = tiny_mamba().train()
    adapter = ll.attach(model, "lora", r=1)
    texts = told(lambda: train(model, adapter, batch))
    assert any("dt_proj" in text and "exclude=" in text for text in texts), texts
    with pytest.raises(ll.CheckError, match=r"(?s)dt_proj.*exclude="):
        ll.check(model, batch)
    assert any("dt_proj" in text for text in told(lambda: adapter.save(tmp_path / "a")))
    adapter.detach()
    adapter = ll.attach(model, "lora", r=1, exclude="dt_proj")
    assert told(lambda: train(model, adapter, batch)) == []
    assert ll.check(model, batch).parameters > 0
    assert told(lambda: adapter.save(tmp_path / "a")) == []


def test_saving_what_was_never_trained(blocks: Make, tmp_path: Path) -> None:
    """Promise: saving parameters that never changed although the model was trained is told (as
    where the optimizer has other parameters); after a step, or after a load, it is not.
    """
    model = blocks()
    adapter = ll.attach(model, "lora", r=2)
    x = torch.randn(4, 8)
    model(x).square().mean().backward()
    (text,) = told(lambda: adapter.save(tmp_path / "a"))
    assert "blocks.0.up" in text
    train(model, adapter, x)
    assert told(lambda: adapter.save(tmp_path / "a")) == []
    loaded = ll.load(other := blocks(), tmp_path / "a")
    assert told(lambda: loaded.save(tmp_path / "b")) == []
    assert torch.equal(other(x), model(x))


def test_saving_with_scale_0(blocks: Make, tmp_path: Path) -> None:
    """Promise: the scale is saved; one of 0, left over from a comparison, is told."""
    adapter = changed(ll.attach(blocks(), "lora", r=2))
    adapter.scale = 0
    (text,) = told(lambda: adapter.save(tmp_path / "a"))
    assert "scale" in text
    assert "0" in text
    adapter.scale = 0.5
    assert told(lambda: adapter.save(tmp_path / "a")) == []


def test_check_takes_any_output() -> None:
    """Promise: an output that is a mapping of any class is looked into."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Any:
            return UserDict(out=self.layers[0](x))

    model = Wrapped()
    ll.attach(model, "lora", r=2)
    assert ll.check(model, torch.ones(2, 4)).sites == 1


# --- weights that stay frozen


def tiny_moe() -> nn.Module:
    """A Qwen3-MoE of transformers: most of its weights are expert weights, which are bare
    parameters.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model: nn.Module = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            head_dim=16,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=64, num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
        )
    )  # fmt: skip
    return model


def test_experts_that_stay_frozen_are_told() -> None:
    """Promise: with default targets, experts that hold more than a tenth of the repeated blocks'
    weights and get no adapter are told by attach, and what adapts them; who chose targets knows,
    and is not.
    """
    model = tiny_moe()
    (text,) = told(lambda: ll.attach(model, "lora", r=2))
    assert "mlp.experts.gate_up_proj" in text
    assert "targets=" in text
    ll.detach(model)
    assert told(lambda: ll.attach(model, "lora", r=2, targets=r"(q|v)_proj$")) == []


@pytest.mark.parametrize("pattern", [r"gate_up_proj$", r"experts\.down_proj$"])
def test_a_pattern_that_means_experts_gets_the_true_reason(
    untouched: Untouched, pattern: str
) -> None:
    """Promise: a pattern that matches bare parameters which do not say how they lie is told that,
    and not asked whether it meant the attention's o_proj."""
    model = tiny_moe()
    for block in model.get_submodule("model.layers"):
        del block.mlp.experts.is_transposed
    with untouched(model), pytest.raises(ll.TargetError, match=r"experts\.\w+") as caught:
        ll.attach(model, "lora", targets=pattern)
    assert "parameter" in str(caught.value)
    assert "o_proj" not in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(("pattern", "kind"), [("conv", "Conv1d"), ("embed", "Embedding")])
def test_layers_of_other_kinds_are_named(untouched: Untouched, pattern: str, kind: str) -> None:
    """Promise: a pattern that hits a convolution or an embedding that no adapter fits is told what
    it hit."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 8, max_norm=1.0),
            "conv": nn.Conv1d(8, 8, 3, groups=2),
            "layers": nn.ModuleList([nn.Linear(8, 8)]),
        }
    )
    with untouched(model), pytest.raises(ll.TargetError, match=kind):
        ll.attach(model, "lora", targets=[pattern, "layers"])


def test_repr_has_the_share_of_the_weights(blocks: Make) -> None:
    """Promise: the adapter says which share of the model's weights its sites cover, counted before
    it came."""
    model = blocks()
    total = sum(p.numel() for p in model.parameters())
    covered = sum(p.numel() for name, p in model.named_parameters() if "blocks" in name)
    weights = sum(
        p.numel() for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2
    )
    shares = [float(n) for n in re.findall(r"([\d.]+) ?%", repr(ll.attach(model, "lora", r=2)))]
    assert len(shares) == 1
    assert 100 * weights / total - 1 <= shares[0] <= 100 * covered / total + 1


def tiny_classifier() -> nn.Module:
    """A Llama of transformers with a fresh head, `score`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model: nn.Module = LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=32,
            pad_token_id=0, num_labels=3,
        )
    )  # fmt: skip
    return model


def test_a_frozen_head_is_told(tiny_llama: Make) -> None:
    """Promise: attach names a classification head that it freezes; a language model's own head, or
    a head that was frozen before, it does not.
    """
    model = tiny_classifier()
    (text,) = told(lambda: ll.attach(model, "lora", r=2))
    assert "score" in text
    assert told(lambda: ll.attach(tiny_llama(), "lora", r=2)) == []
    frozen = tiny_classifier()
    frozen.score.requires_grad_(False)
    assert told(lambda: ll.attach(frozen, "lora", r=2)) == []


def test_what_a_user_left_trainable_on_purpose_is_told() -> None:
    """Promise: where everything was frozen but a norm, the norm was meant to train: it is named."""
    model = tiny_classifier().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    (text,) = told(lambda: ll.attach(model, "lora", r=2))
    assert "norm" in text


def test_parameters_unfrozen_by_hand_are_told_when_saving(tmp_path: Path) -> None:
    """Promise: a head unfrozen after attach trains, and is not in the file: save says so."""
    model = tiny_classifier()
    model.score.requires_grad_(False)
    adapter = changed(ll.attach(model, "lora", r=2))
    assert told(lambda: adapter.save(tmp_path / "a")) == []
    model.score.requires_grad_(True)
    (text,) = told(lambda: adapter.save(tmp_path / "a"))
    assert "score" in text


# --- the choice of layers


def test_layers_that_leaves_nothing_of_a_pattern(tiny_llama: Make, untouched: Untouched) -> None:
    """Promise: `layers=` that takes away all that one pattern matches is an error that names the
    pattern, as `exclude=` is."""
    model = tiny_llama()
    with untouched(model), pytest.raises(ll.TargetError, match=r"(?s)layers.*lm_head") as caught:
        ll.attach(model, "lora", layers=[1], targets=[r"q_proj$", r"lm_head$"], exclude=())
    assert "q_proj" not in str(caught.value).splitlines()[0]


class Foreign(nn.Module):
    """Linear-like, with names of its own, as quantised layers of some libraries have."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = 8, 8
        self.register_buffer("qweight", torch.zeros(8, 2, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_foreign_linear_layer_beside_plain_ones() -> None:
    """Promise: a layer that looks linear by any of the usual names, and that nothing here can read,
    is named, not passed over beside the plain ones."""
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": Foreign()})])}
    )
    try:
        texts = told(lambda: ll.attach(model, "lora", r=2))
    except ll.LayerKindError as error:
        texts = [str(error)]
    assert any(r"layers.0.b" in text and "Foreign" in text for text in texts), texts


PEFT_WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": ["up"]}, r"targets="),
    "all-linear": ({"targets": "all-linear"}, r"targets"),
    "target_modules all-linear": ({"target_modules": "all-linear"}, r"targets"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
    "bias": ({"bias": "none"}, r"bias"),
    "task_type": ({"task_type": "CAUSAL_LM"}, r"task_type"),
    "lora_alpha": ({"lora_alpha": 16}, r"alpha="),
    "lora_dropout": ({"lora_dropout": 0.1}, r"dropout="),
    "use_rslora": ({"use_rslora": True}, r"rslora="),
    "layers_to_transform": ({"layers_to_transform": [0]}, r"layers="),
    "rank_pattern": ({"rank_pattern": {"up": 4}}, r"overrides="),
    "exclude_modules": ({"exclude_modules": ["up"]}, r"exclude="),
}


@pytest.mark.parametrize(("given", "way"), PEFT_WORDS.values(), ids=PEFT_WORDS)
def test_words_of_peft(blocks: Make, untouched: Untouched, given: dict[str, Any], way: str) -> None:
    """Promise: who writes PEFT's word is told ours."""
    model = blocks()
    with untouched(model), pytest.raises(ll.LoraLiteError, match=way) as caught:
        ll.attach(model, "lora", **given)
    assert next(iter(given)) in str(caught.value)


class Stage(nn.Module):
    """A block of a convolutional network's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc(x)
        return out


def test_a_sequential_of_one_class_counts_as_blocks() -> None:
    """Promise: repeated blocks that a model (timm's) holds in an nn.Sequential are blocks, by
    default and for layers=; a Sequential of torch's own layers is not.
    """

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Stage(), Stage(), Stage())
            self.tail = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.tail(self.blocks(x))
            return out

    def paths(**choice: Any) -> list[str]:
        return [p.path for p in ll.plan(Vision(), "lora", r=2, **choice).placements]

    assert paths() == ["blocks.0.fc", "blocks.1.fc", "blocks.2.fc"]
    assert paths(layers=[0, 2]) == ["blocks.0.fc", "blocks.2.fc"]
    with pytest.raises(ll.TargetError, match="layers"):
        ll.plan(Vision(), "lora", r=2, layers=3)


# --- layers that are replaced while adapted


def _resized(model: nn.Module) -> str:
    model.resize_token_embeddings(40, mean_resizing=False)
    return "lm_head"


def _cut(model: nn.Module) -> str:
    model.model.layers = model.model.layers[:1]
    return r"layers\.1"


def _replaced(model: nn.Module) -> str:
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)
    return r"layers\.0\.self_attn\.q_proj"


def _removed(model: nn.Module) -> str:
    del model.model.layers[0].self_attn.q_proj
    return r"layers\.0\.self_attn\.q_proj"


def _moved(model: nn.Module) -> str:
    attention = model.model.layers[0].self_attn
    attention.query = attention._modules.pop("q_proj")
    return r"layers\.0\.self_attn\.q_proj"


def _stripped(model: nn.Module) -> str:
    layer = model.model.layers[0].self_attn.q_proj
    del layer.lora_default_A
    return r"layers\.0\.self_attn\.q_proj"


REPLACEMENTS = {
    f.__name__.strip("_"): f for f in (_resized, _cut, _replaced, _removed, _moved, _stripped)
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_replaced_layer_is_found(
    tiny_llama: Make, tmp_path: Path, replace: Callable[[nn.Module], str]
) -> None:
    """Promise: a layer that was replaced, removed, moved or stripped while adapted is named by the
    next save, check, adapters and state_dict; detach always works, and leaves nothing on what is
    left of the model or on what was taken out of it."""
    model = tiny_llama()
    adapter = changed(ll.attach(model, "lora", r=2, targets=[r"q_proj$", r"lm_head$"], exclude=()))
    before = list(model.modules())
    site = replace(model)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    for use in (
        lambda: adapter.save(tmp_path / "a"),
        lambda: ll.save(model, tmp_path / "a"),
        lambda: ll.check(model, batch),
        lambda: ll.adapters(model),
        adapter.state_dict,
        lambda: adapter.load_state_dict({}),
    ):
        with pytest.raises(ll.LoraLiteError, match=site) as caught:
            use()
        assert "detach" in str(caught.value).lower()
    assert not list(tmp_path.iterdir())
    adapter.detach()
    for module in [*before, *model.modules()]:
        assert not [name for name in module._parameters if name.startswith("lora_")]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert ll.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())
    again = ll.attach(model, "lora", r=2, targets="o_proj")
    again.detach()


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_detach_by_the_models_own_name(
    tiny_llama: Make, replace: Callable[[nn.Module], str]
) -> None:
    """Promise: so does `ll.detach(model)`, for who has lost the handle."""
    model = tiny_llama()
    ll.attach(model, "lora", r=2, targets=[r"q_proj$", r"lm_head$"], exclude=())
    replace(model)
    ll.detach(model)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert ll.adapters(model) == {}


# --- buffers


class Normed(nn.Module):
    """Training changes the buffers of its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layers[0](x))
        return out


def test_buffers_that_training_changed(tmp_path: Path) -> None:
    """Promise: running statistics are the base's: save says that they changed and are not in the
    file, the last detach restores them bit for bit, an earlier one does not."""
    model = Normed().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = changed(ll.attach(model, "lora", r=2, name="first"))
    second = changed(ll.attach(model, "lora", r=2, name="second"))
    assert told(lambda: first.save(tmp_path / "a")) == []
    model(torch.randn(9, 8) + 3)
    trained = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not torch.equal(trained["norm.running_mean"], before["norm.running_mean"])
    (text,) = told(lambda: first.save(tmp_path / "a"))
    assert "norm" in text
    first.detach()
    assert all(torch.equal(buffer, trained[name]) for name, buffer in model.named_buffers())
    second.detach()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.dtype == before[name].dtype


def test_buffers_that_nobody_trains_are_left_alone() -> None:
    """Promise: a buffer that the user sets between attach and detach by another tensor, or that is
    new, is not brought back from the dead."""
    model = Normed().eval()
    adapter = ll.attach(model, "lora", r=2)
    model.register_buffer("mine", torch.ones(2))
    model(torch.randn(9, 8))
    adapter.detach()
    assert torch.equal(model.mine, torch.ones(2))


# --- files of others


@pytest.fixture
def adapted(tiny_llama: Make) -> nn.Module:
    """A Llama with an adapter that does something."""
    model = tiny_llama()
    changed(ll.attach(model, "lora", r=2))
    return model


def refused(model: nn.Module, path: Path, *words: str) -> str:
    """What load says of a path; it must hold each of the words."""
    with pytest.raises(ll.AdapterFileError) as caught:
        ll.load(model, path)
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    return text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_directory_of_save_pretrained(
    adapted: nn.Module, tiny_llama: Make, untouched: Untouched, tmp_path: Path
) -> None:
    """Promise: the folder that `model.save_pretrained` wrote, and the file in it, are said to be
    the weights of an adapted model, with how an adapter is saved.
    """
    adapted.save_pretrained(tmp_path / "whole")
    with untouched(model := tiny_llama()):
        refused(model, tmp_path / "whole", "directory|folder", r"save\(")
        refused(
            model,
            tmp_path / "whole" / "model.safetensors",
            r"lora_default_|state.dict|model",
            r"save\(",
        )


def test_a_plain_state_dict(
    adapted: nn.Module, tiny_llama: Make, untouched: Untouched, tmp_path: Path
) -> None:
    """Promise: so is what torch.save or safetensors made of a state dict, adapted or plain."""
    torch.save(adapted.state_dict(), tmp_path / "pickle.pt")
    torch.save(ll.adapters(adapted)["default"].state_dict(), tmp_path / "adapter.pt")
    save_file({k: v.clone() for k, v in adapted.state_dict().items()}, tmp_path / "adapted")
    save_file({k: v.clone() for k, v in tiny_llama().state_dict().items()}, tmp_path / "plain")
    with untouched(model := tiny_llama()):
        refused(model, tmp_path / "pickle.pt", "pickle|torch.save", r"save\(")
        refused(model, tmp_path / "adapter.pt", "pickle|torch.save", r"save\(")
        refused(model, tmp_path / "adapted", "lora_default|adapted model|state.dict", r"save\(")
        refused(model, tmp_path / "plain", "not an adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_peft(
    tiny_llama: Make, untouched: Untouched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a folder or a file of PEFT is called that where no plugin is there to read it."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("lora_lite.format_plugins._entry_points", dict)
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "peft"
    )
    with untouched(model := tiny_llama()):
        refused(model, tmp_path / "peft", "PEFT")
        refused(model, tmp_path / "peft" / "adapter_model.safetensors", "PEFT")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_trainer(
    adapted: nn.Module, tiny_llama: Make, untouched: Untouched, tmp_path: Path
) -> None:
    """Promise: a folder of Trainer is called that, with how it is resumed."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    Trainer(adapted, arguments, train_dataset=rows).train()
    with untouched(model := tiny_llama()):
        refused(model, tmp_path / "checkpoint-1", "Trainer|checkpoint", "resume_from_checkpoint")


def test_a_folder_that_holds_an_adapter(
    adapted: nn.Module, tiny_llama: Make, tmp_path: Path
) -> None:
    """Promise: a folder in which an adapter of ours lies is told by that file's name."""
    ll.save(adapted, tmp_path / "mine.safetensors")
    refused(tiny_llama(), tmp_path, r"mine\.safetensors")


def prefixed(model: nn.Module, prefix: str) -> nn.Module:
    """The model inside of a wrapper that has it under this name."""
    return nn.ModuleDict({prefix: model})


def test_another_wrapper(blocks: Make, untouched: Untouched, tmp_path: Path) -> None:
    """Promise: a file whose sites have another prefix than the model's is loaded with rename=, and
    the error without it proposes just that, in words that can be pasted.
    """
    x = torch.randn(3, 8)
    wrapped = prefixed(blocks(), "policy")
    changed(ll.attach(wrapped, "lora", r=2)).save(tmp_path / "wrapped")
    changed(ll.attach(plain := blocks(), "lora", r=2)).save(tmp_path / "plain")
    for path, make in [
        (tmp_path / "wrapped", blocks),
        (tmp_path / "plain", lambda: prefixed(blocks(), "policy")),
    ]:
        model = make()
        with untouched(model):
            text = refused(model, path, r"rename=")
        proposal = re.search(r"rename=(\{[^}]*\})", text)
        assert proposal, text
        adapter = ll.load(model, path, rename=eval(proposal[1]))
        assert len(adapter.sites) == 4
        inner = model if hasattr(model, "blocks") else model["policy"]
        origin = wrapped["policy"] if path.name == "wrapped" else plain
        assert torch.equal(inner(x), origin(x))
        adapter.save(tmp_path / "again")
        ll.load(make(), tmp_path / "again")


@pytest.mark.parametrize(
    "rename", [{r"blocks\.\d": "blocks.0"}, {"nothing": "x"}], ids=["two to one", "no match"]
)
def test_renames_that_are_wrong(
    blocks: Make, untouched: Untouched, tmp_path: Path, rename: dict[str, str]
) -> None:
    """Promise: a rename that makes one site of two, or that matches nothing, is an error that names
    it."""
    changed(ll.attach(blocks(), "lora", r=2)).save(tmp_path / "a")
    with untouched(model := blocks()), pytest.raises(ll.AdapterFileError, match="rename"):
        ll.load(model, tmp_path / "a", rename=rename)


# --- adapters that never separate


@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_adapters_of_two_names_start_apart(blocks: Make, variant: str) -> None:
    """Promise: two adapters of one variant on one model have start values of their own, so that
    they do not stay one adapter for ever; the same name and seed start alike, on any model.
    """
    model = blocks()
    one, two = (ll.attach(model, variant, r=2, name=name).state_dict() for name in ("one", "two"))
    again = ll.attach(blocks(), variant, r=2, name="one").state_dict()
    random_keys = [key for key in one if not torch.equal(one[key], torch.zeros_like(one[key]))]
    assert any(not torch.equal(one[key], two[key]) for key in random_keys)
    assert all(torch.equal(one[key], again[key]) for key in one)
    default = ll.attach(blocks(), variant, r=2).state_dict()
    assert any(not torch.equal(default[key], one[key]) for key in random_keys)


def test_two_adapters_separate_in_training() -> None:
    """Promise: trained together, two adapters of rank 2 are more than one of rank 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    x, z = torch.randn(64, 16), torch.randn(64, 16)
    adapters = [ll.attach(model, "lora", targets="0", r=2, name=name) for name in "ab"]
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - z).square().mean().backward()
        optimizer.step()
    products = [a.state_dict()["0.B"] @ a.state_dict()["0.A"] for a in adapters]
    assert torch.linalg.matrix_rank(sum(products), rtol=1e-4) == 4


# --- base weights that nothing can start from


def broken(weight: Tensor) -> nn.Module:
    """A model whose second layer has this weight."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})
    model["layers"][1].weight = nn.Parameter(weight)
    return model


BROKEN = {
    "nan": torch.full((8, 8), torch.nan),
    "one nan": torch.where(torch.eye(8).bool() & (torch.arange(8) == 7), torch.nan, 1.0),
    "inf": torch.full((8, 8), torch.inf),
    "complex": torch.ones(8, 8, dtype=torch.complex64),
    "empty, as of ZeRO-3": torch.empty(0),
    "empty, of two dimensions": torch.empty(0, 8),
}


@pytest.mark.parametrize("variant", ["lora", "pissa", "dora", "antipasto"])
@pytest.mark.parametrize("weight", BROKEN.values(), ids=BROKEN)
def test_a_broken_base_weight_is_named(variant: str, weight: Tensor) -> None:
    """Promise: a base weight that is not finite, complex or empty is named before anything is
    computed from it."""
    model = broken(weight.clone())
    with pytest.raises(ll.LoraLiteError, match=r"layers\.1") as caught:
        ll.attach(model, variant, r=4)
    assert "layers.0" not in str(caught.value)
    assert not any("lora_" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["pissa", "antipasto"])
def test_a_weight_of_zeros_is_told(variant: str) -> None:
    """Promise: a weight of zeros, from which some methods get no gradient at all, is a warning that
    names the layer."""
    model = broken(torch.zeros(8, 8))
    texts = told(lambda: ll.attach(model, variant, r=4))
    assert any("layers.1" in text and "zero" in text for text in texts), texts
    assert not any("layers.0" in text for text in texts)


def test_warnings_are_of_one_class() -> None:
    """Promise: one filter silences them all; to who knows nothing of us they are UserWarnings."""
    assert issubclass(ll.AdapterWarning, UserWarning)
    model = Reads()
    ll.attach(model, "lora", r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ll.AdapterWarning)
        copy.deepcopy(model).train()(torch.randn(3, 8))
    with pytest.warns(ll.AdapterWarning):
        model.train()(torch.randn(3, 8))
