"""Resuming: a state dict of an adapted model goes back under the same variant, fields and name, or
is refused.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import safetensors
import torch
from torch import Tensor, nn

Make = Callable[..., nn.Module]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
RANKS = {"antipasto": 4}
TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])


def trained(model: nn.Module, variant: str = "lora", **arguments: Any) -> ll.Adapter:
    """An adapter that does something."""
    adapter = ll.attach(model, variant, **{"r": RANKS.get(variant, 2), **arguments})
    with torch.no_grad():
        for index, p in enumerate(adapter.parameters()):
            p.add_(0.1 + 0.01 * index)
    return adapter


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through torch.save, as a training loop's own checkpoint."""
    torch.save(state, buffer := io.BytesIO())
    again: dict[str, Tensor] = torch.load(io.BytesIO(buffer.getvalue()))
    return again


def logits(model: nn.Module) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        out: Tensor = model(X)
    return out


# --- model.state_dict() and load_state_dict()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("variant", ["lora", "dora", "antipasto", "hra"])
def test_the_same_adapter_resumes(blocks: Make, variant: str, name: str, strict: bool) -> None:
    """Promise: the state dict of an adapted model, loaded onto a model adapted alike, gives back
    every bit, without a word."""
    model, again = blocks(), blocks()
    trained(model, variant, name=name)
    ll.attach(again, variant, r=RANKS.get(variant, 2), name=name)
    assert not torch.equal(logits(again), logits(model))
    found = again.load_state_dict(copied(model.state_dict()), strict=strict)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(logits(again), logits(model))


OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "alpha": ({"alpha": 64.0}, {}, "alpha"),
    "rslora": ({}, {"rslora": True}, "rslora"),
    "dropout": ({}, {"dropout": 0.5}, "dropout"),
    "one site's": ({"overrides": {r"1\.up": {"alpha": 3.0}}}, {}, r"blocks\.1\.up|alpha"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("before", "after", "told"), OTHER.values(), ids=OTHER)
def test_other_fields_are_refused(
    blocks: Make, before: dict[str, Any], after: dict[str, Any], told: str, strict: bool
) -> None:
    """Promise: the same tensors under other fields would be another adapter: an error that names
    what differs, also with strict=False, which is what Trainer loads with."""
    model, again = blocks(), blocks()
    trained(model, **before)
    ll.attach(again, "lora", **{"r": 2, **after})
    with pytest.raises(ll.AdapterError, match=told):
        again.load_state_dict(copied(model.state_dict()), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_another_variant_is_refused(blocks: Make, strict: bool) -> None:
    """Promise: another variant is refused though its tensors have the same names and shapes."""
    model, again = blocks(), blocks()
    trained(model, "lora")
    ll.attach(again, "eva", r=2, calibration=[torch.randn(20, 8)])
    with pytest.raises(ll.AdapterError, match=r"(?s)lora.*eva|eva.*lora"):
        again.load_state_dict(copied(model.state_dict()), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_another_name_is_refused(blocks: Make, strict: bool) -> None:
    """Promise: resumed under another name, the adapter would silently stay at its start: an error
    that says both names."""
    model, again = blocks(), blocks()
    trained(model)
    ll.attach(again, "lora", r=2, name="other")
    with pytest.raises(ll.AdapterError, match=r"(?s)default.*other|other.*default"):
        again.load_state_dict(copied(model.state_dict()), strict=strict)


def test_other_sites_are_refused(blocks: Make) -> None:
    """Promise: so would the sites that the state dict does not have."""
    for saved, attached in [
        ({"layers": 0}, {}),
        ({}, {"layers": 0}),
        ({"layers": 0}, {"layers": 1}),
    ]:
        model, again = blocks(), blocks()
        trained(model, **saved)
        ll.attach(again, "lora", r=2, **attached)
        for strict in (True, False):
            with pytest.raises((ll.AdapterError, RuntimeError)):
                again.load_state_dict(copied(model.state_dict()), strict=strict)


def test_several_adapters(blocks: Make) -> None:
    """Promise: each adapter is checked against its own fields; one that the state dict lacks, or
    has too many, is said.
    """
    model, again = blocks(), blocks()
    for target in (model, again):
        trained(target, name="a", alpha=1.0)
        trained(target, name="b", alpha=2.0)
    again.load_state_dict(copied(model.state_dict()))
    assert torch.equal(logits(again), logits(model))
    swapped = blocks()
    trained(swapped, name="a", alpha=2.0)
    trained(swapped, name="b", alpha=1.0)
    with pytest.raises(ll.AdapterError, match="alpha"):
        swapped.load_state_dict(copied(model.state_dict()))
    alone = blocks()
    trained(alone, name="a", alpha=1.0)
    with pytest.raises(ll.AdapterError, match="b"):
        alone.load_state_dict(copied(model.state_dict()), strict=False)


def test_base_weights_alone_still_load(blocks: Make) -> None:
    """Promise: what is no adapter's state is not complained of: the base's weights go into an
    adapted model with strict=False, the adapter stays.
    """
    model, base = blocks(), blocks(width=8)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(0.5)
    adapter = trained(model)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert torch.equal(model.blocks[0].up.weight, base.blocks[0].up.weight)
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())


def test_adapted_state_onto_a_plain_model_is_noticed(blocks: Make) -> None:
    """Promise: strict loading of an adapted model's state dict onto the plain model is torch's own
    error, since the keys are there."""
    model = blocks()
    trained(model)
    with pytest.raises(RuntimeError, match="lora_default_"):
        blocks().load_state_dict(model.state_dict())


# --- the tensor that holds the fields


def fields_keys(state: Any) -> list[str]:
    """The keys of the tensors that hold fields."""
    return [key for key in state if key.rpartition(".")[2].endswith("_fields")]


def test_where_the_fields_are(blocks: Make, untouched: Any, tmp_path: Path) -> None:
    """Promise: one frozen tensor, `lora_<name>_fields` on the adapter's first site, which is no
    part of the adapter's own state, of its file, its parameters or its optimizer, and goes on
    detach.
    """
    model = blocks()
    with untouched(model):
        adapter = trained(model, name="n")
        (key,) = fields_keys(model.state_dict())
        assert key == f"{next(iter(adapter.sites))}.lora_n_fields"
        assert not dict(model.named_parameters())[key].requires_grad
        assert not fields_keys(adapter.state_dict())
        assert not fields_keys(dict(adapter.named_parameters()))
        ids = {id(p) for group in adapter.param_groups(0.1) for p in group["params"]}
        assert id(dict(model.named_parameters())[key]) not in ids
        adapter.save(tmp_path / "a")
        with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
            assert not fields_keys(file.keys())
        adapter.detach()


def test_the_fields_survive_what_happens_to_a_model(blocks: Make) -> None:
    """Promise: casts, copies and moves of the model do not damage them."""
    model = blocks()
    trained(model)
    for changed in (
        copy.deepcopy(model).half(),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).double().float(),
        copy.deepcopy(model).to("cpu").requires_grad_(False),
    ):
        dtype = next(changed.parameters()).dtype
        again = blocks().to(dtype)
        ll.attach(again, "lora", r=2)
        again.load_state_dict(copied(changed.state_dict()))
        other = blocks().to(dtype)
        ll.attach(other, "lora", r=2, alpha=3.0)
        with pytest.raises(ll.AdapterError, match="alpha"):
            other.load_state_dict(copied(changed.state_dict()))
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    ll.detach(twin)
    assert not fields_keys(twin.state_dict())


def test_a_refused_state_dict_changes_nothing(blocks: Make) -> None:
    """Promise: the fields are checked before the first tensor is copied."""
    model, again = blocks(), blocks()
    trained(model, alpha=64.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(1.0)
    ll.attach(again, "lora", r=2)
    before = {key: value.clone() for key, value in again.state_dict().items()}
    with pytest.raises(ll.AdapterError):
        again.load_state_dict(copied(model.state_dict()))
    for key, value in again.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_states_without_the_fields_still_load(blocks: Make) -> None:
    """Promise: checkpoints that are older than the fields go in with strict=False."""
    model, again = blocks(), blocks()
    trained(model)
    ll.attach(again, "lora", r=2)
    state = copied(model.state_dict())
    del state[fields_keys(state)[0]]
    again.load_state_dict(state, strict=False)
    assert torch.equal(logits(again), logits(model))


# --- Trainer


def train(model: nn.Module, folder: Path, steps: int, resume: Path | None = None) -> None:
    """A few steps of transformers' Trainer, which keeps a checkpoint of each."""
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=1, learning_rate=5e-2, report_to=[], use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", per_device_train_batch_size=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", ["lora", "antipasto"])
def test_trainer_resumes_exactly(tiny_llama: Make, tmp_path: Path, variant: str) -> None:
    """Promise: a run that is cut off and resumed from Trainer's own checkpoint ends where the run
    that was not cut off ends."""
    through, first, second = tiny_llama(), tiny_llama(), tiny_llama()
    adapters = [ll.attach(model, variant, r=4) for model in (through, first, second)]
    train(through, tmp_path / "through", 4)
    train(first, tmp_path / "cut", 2)
    train(second, tmp_path / "cut", 4, resume=tmp_path / "cut" / "checkpoint-2")
    expected = adapters[0].state_dict()
    for key, value in adapters[2].state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "told"),
    [({"alpha": 8.0}, "alpha"), ({"name": "other"}, r"(?s)default.*other|other.*default")],
    ids=["other fields", "another name"],
)
def test_trainer_refuses_another_adapter(
    tiny_llama: Make, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    """Promise: Trainer loads with strict=False; another adapter is refused all the same."""
    first, second = tiny_llama(), tiny_llama()
    ll.attach(first, "lora", r=4)
    train(first, tmp_path, 1)
    ll.attach(second, "lora", **{"r": 4, **change})
    with pytest.raises(ll.AdapterError, match=told):
        train(second, tmp_path, 2, resume=tmp_path / "checkpoint-1")
