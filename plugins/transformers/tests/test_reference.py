"""The reference of preference training: the model as it was, without a second one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import lora_lite as ll
import pytest
import torch
from lora_lite_transformers import Reference
from torch import Tensor, nn

from .conftest import TARGETS, Held, moved

Make = Callable[..., nn.Module]
TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS).logits
    return out


def frozen_copy(model: nn.Module) -> nn.Module:
    """What the reference stands for."""
    return copy.deepcopy(model).eval()


@pytest.mark.parametrize("variant", ["lora", "dora", "hra", "pissa"])
@pytest.mark.parametrize("was_trained", [False, True])
def test_it_computes_what_a_full_copy_would(
    tiny_llama: Make, variant: str, was_trained: bool
) -> None:
    """Bit for bit, whatever training does to the adapter afterwards; the policy goes on unchanged.
    A new adapter that changes nothing is disabled; any other one is copied.
    """
    model = tiny_llama()
    adapter = ll.attach(model, variant, r=2, targets=TARGETS)
    if was_trained:
        moved(adapter)
    expected = frozen_copy(model)
    reference = Reference(model)
    new = not was_trained and variant != "hra"  # HRA starts at the base up to rounding
    assert list(ll.adapters(model)) == ["default"] + ([] if new else ["default_reference"])
    moved(adapter, seed=2)
    policy = logits(model)
    assert torch.equal(logits(reference), logits(expected))
    assert torch.equal(logits(model), policy)
    assert not torch.equal(policy, logits(expected))


def test_an_adapter_from_a_file_is_copied(tiny_llama: Make, tmp_path: str) -> None:
    """Training that starts from an adapter compares with that adapter, and not with the base."""
    trained = moved(ll.attach(tiny_llama(), "lora", r=2, targets=TARGETS))
    trained.save(f"{tmp_path}/sft")
    model = tiny_llama()
    base = logits(model)
    adapter = ll.load(model, f"{tmp_path}/sft")
    start = logits(frozen_copy(model))
    reference = Reference(model)
    moved(adapter, seed=2)
    assert torch.equal(logits(reference), start)
    assert not torch.equal(start, base)


def test_a_frozen_adapter_stays_in_the_reference(tiny_llama: Make) -> None:
    """An adapter below the one that is trained is a part of both."""
    model = tiny_llama()
    below = moved(ll.attach(model, "lora", r=2, targets=TARGETS, name="below"))
    for parameter in below.parameters():
        parameter.requires_grad_(False)
    expected = frozen_copy(model)
    ll.attach(model, "lora", r=2, targets=TARGETS)
    reference = Reference(model)
    moved(ll.adapters(model)["default"])
    assert set(ll.adapters(model)) == {"below", "default"}
    assert torch.equal(logits(reference), logits(expected))


def test_it_has_no_parameters_and_is_no_part_of_the_policy(tiny_llama: Make) -> None:
    """Nothing to move, to shard, to count or to train twice; but the policy's config is there."""
    model = tiny_llama()
    ll.attach(model, "lora", r=2, targets=TARGETS)
    before = set(model.state_dict())
    reference = Reference(model)
    assert not list(reference.parameters())
    assert list(reference.modules()) == [reference]
    assert set(model.state_dict()) == before
    assert reference.config is model.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = reference.no_such_thing


def test_it_evaluates_and_leaves_every_module_in_its_mode(tiny_llama: Make) -> None:
    """Dropout is off inside; afterwards each module is in its own mode again, without gradients."""
    model = tiny_llama()
    ll.attach(model, "lora", r=2, dropout=0.5, targets=TARGETS)
    reference = Reference(moved(ll.adapters(model)["default"]) and model)
    model.train()
    model.get_submodule("model.norm").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    first = reference(TOKENS).logits
    assert torch.equal(first, reference(TOKENS).logits)
    assert not first.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_a_second_reference_takes_the_place_of_the_first(tiny_llama: Make) -> None:
    """A second training of the same model compares with its own start."""
    model = tiny_llama()
    adapter = moved(ll.attach(model, "lora", r=2, targets=TARGETS))
    first = Reference(model)
    moved(adapter, seed=2)
    expected = frozen_copy(model)
    second = Reference(model)
    moved(adapter, seed=3)
    assert set(ll.adapters(model)) == {"default", "default_reference"}
    assert torch.equal(logits(second), logits(expected))
    with pytest.raises(ll.AdapterError, match="detached"):
        first(TOKENS)


def test_classes_that_are_not_installed_are_copied_too(tiny_llama: Make) -> None:
    """A variant that was written in a notebook."""
    model = tiny_llama()
    adapter = moved(ll.attach(model, Held(), targets=TARGETS))
    expected = frozen_copy(model)
    reference = Reference(model)
    moved(adapter, seed=2)
    assert torch.equal(logits(reference), logits(expected))


def test_a_model_without_an_adapter_is_refused(tiny_llama: Make) -> None:
    """It would compare the model with itself as it is trained."""
    with pytest.raises(ll.AdapterError, match="cannot be its own reference"):
        Reference(tiny_llama())
