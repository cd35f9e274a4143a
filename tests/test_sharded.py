"""Sharded, wrapped, batched: FSDP2, FSDP1, the inside of a DDP, vmap, parametrisations."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.func import functional_call, vmap
from two_processes import launch

Make = Callable[..., nn.Module]
WORKER = Path(__file__).with_name("sharded_worker.py")
VARIANTS = ("lora", "antipasto")
SHARING = ("vera", "vb_lora", "adalora")  # frozen and trainable tensors that all layers share


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(WORKER, folder, *VARIANTS, *SHARING)
    return [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(2)]


def of(facts: list[dict[str, Any]], case: str, variant: str) -> list[dict[str, Any]]:
    """The facts of one case, of both processes; an exception is a failure here."""
    found = [each[f"{case} {variant}"] for each in facts]
    assert not [each["error"] for each in found if "error" in each]
    return found


def is_refused(text: str, words: str) -> bool:
    """Whether an outcome is an error of ours that names what is wrong."""
    return bool(re.match(r"Adapter(File)?Error: ", text)) and bool(re.search(words, text))


@pytest.mark.parametrize("variant", VARIANTS + SHARING)
def test_fsdp2_loads_a_state(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: load_state_dict copies a full state, and a state of DTensors, into sharded tensors;
    each process keeps its shard; a file saved afterwards is whole."""
    for found in of(facts, "fsdp2", variant):
        keys = ("state", "sharded", "output", "kept", "dtensors", "file")
        assert {key: found[key] for key in keys} == dict.fromkeys(keys, True)


@pytest.mark.parametrize("variant", VARIANTS + SHARING)
def test_fsdp2_refuses_a_wrong_state_everywhere(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: a wrong state is an error in every process, before any shard of any tensor is
    written."""
    for found in of(facts, "fsdp2", variant):
        for wrong in ("nan", "shape", "overflow"):
            assert is_refused(found[wrong], r"blocks\.\d|shared:"), found[wrong]
        assert found["untouched"]


@pytest.mark.parametrize("variant", VARIANTS + SHARING)
def test_fsdp2_computes_what_one_process_does(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: outputs and gradients under FSDP2 are those of one process, also of tensors that
    layers share; where these would not be reduced, an error says how to shard."""
    for found in of(facts, "gradients", variant):
        assert found["same"]
        assert found["inside another"]
        if variant == "vb_lora":
            assert is_refused(found["blocks alone"], r"fully_shard\(model\)"), found
        else:
            assert found["blocks alone"] == "done"


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp2_shards_adapters_of_experts(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: an adapter on fused experts computes and learns under FSDP2 as it does alone, and
    its file is whole."""
    for found in of(facts, "experts", variant):
        assert found == {"same": True, "file": True}


@pytest.mark.parametrize("variant", VARIANTS + SHARING)
def test_resuming_a_sharded_model(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: the state dict of a sharded model resumes, and another adapter's is refused."""
    for found in of(facts, "resumed", variant):
        assert found["same"]
        assert is_refused(found["another name"], "default"), found["another name"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp1_is_exact_or_refused_by_name(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: under FSDP1 the adapter computes as before; what reads or changes its tensors is
    exact, or refused with FSDP's name; nothing writes a file of empty shards."""
    words = "FSDP|FullyShardedDataParallel"
    cases = of(facts, "fsdp1", variant)
    assert any(found["gradients"] for found in cases)  # a process may hold no part of a small one
    for found in cases:
        assert found["output"]
        for call, exact in (("save", "whole file"), ("state_dict", "whole state")):
            assert found[exact] or is_refused(found[call], words), (call, found[call])
        assert found["save"] == "done" or not found["whole file"]
        assert found["repr"] == "done"
        for call in ("attach", "attach inside", "load", "detach"):
            assert is_refused(found[call], words), (call, found[call])


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp1_with_full_parameters(facts: list[dict[str, Any]], variant: str) -> None:
    """Promise: where a message says to summon the full parameters, that works, and is exact."""
    for found in of(facts, "fsdp1_summoned", variant):
        assert found["save"] == "done"
        assert found["whole"]
        assert found["exact"]


def test_the_inside_of_a_ddp(facts: list[dict[str, Any]]) -> None:
    """Promise: attaching to a DDP is refused; attaching to the module inside of one is refused
    where it can be found, else the documentation of attach says not to."""
    for found in of(facts, "ddp_inside", "lora"):
        assert is_refused(found["outside"], "DistributedDataParallel|wrapped")
        refused = is_refused(found["inside"], "DistributedDataParallel|DDP|wrapped")
        documented = re.search("DistributedDataParallel|DDP", ll.attach.__doc__ or "")
        assert refused or found.get("reduced") or documented


# --- one process


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "hra", "delora", "ia3", "antipasto"])
def test_vmap_over_adapters(blocks: Make, variant: str) -> None:
    """Promise: torch.func's functional_call and vmap run many sets of parameters at once through
    one adapted model, as through any module.
    """
    model = blocks()
    fields = {} if variant == "ia3" else {"r": 4}
    targets = {"targets": "(up|down)$"} if variant == "ia3" else {}
    adapter = ll.attach(model, variant, **fields, **targets)
    x = torch.randn(3, 8)
    sets, expected = [], []
    for index in range(3):
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.02 * (index + 1))
            expected.append(model(x))
        sets.append({k: v.detach().clone() for k, v in model.named_parameters()})
    stacked = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    outputs = vmap(lambda p, x: functional_call(model, p, (x,)), in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(outputs, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_functional_call_with_gradients(blocks: Make) -> None:
    """Promise: so do its gradients: those of the substituted tensors."""
    model = blocks()
    adapter = ll.attach(model, "dora", r=2)
    x = torch.randn(3, 8)
    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    free = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = torch.func.grad(
        lambda trained: functional_call(model, {**free, **trained}, (x,)).square().sum()
    )({name: free[name] for name in expected})
    assert len(expected) == len(list(adapter.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


class Twice(nn.Module):
    """Two times the weight."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_weight_that_is_parametrized_after_attach(variant: str) -> None:
    """Promise: a parametrisation of the base's weight that comes after the adapter (weight or
    spectral norm, say) is followed: the adapter sees the weight that the layer computes with."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer)
    adapter = ll.attach(model, variant, r=2, targets="0")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    x = torch.randn(3, 8)
    twice = nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        twice[0].weight.mul_(2)
    expected = twice(x)
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2)  # right_inverse had halved it
    torch.testing.assert_close(model(x), expected)
