"""AdaLoRA: PEFT's trajectory, the budget, resumed runs, the published counts, half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_adalora import AdaLoRA
from torch import nn

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
SCHEDULE: dict[str, Any] = {
    "r": 4,
    "target": 0.5,
    "total": 12,
    "warmup": 0.17,
    "final": 0.25,
    "every": 2,
}


def test_trains_as_peft_does(tiny_llama: Callable[..., nn.Module]) -> None:
    """From the same start, without a penalty: the same parameters, and the same triplets left, step
    by step to the end of the schedule."""
    model, other = tiny_llama(), tiny_llama()
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=3,
        deltaT=2,
        total_step=12,
        lora_alpha=16,
        orth_reg_weight=1e-12,
        target_modules=["q_proj", "down_proj"],
    )
    theirs = peft.get_peft_model(other, config).train()
    adapter = ll.attach(
        model.train(), "adalora", targets=r"(q_proj|down_proj)$", reg=0.0, alpha=16.0, **SCHEDULE
    )
    named = dict(theirs.named_parameters())
    letters = {"P": "B", "Lambda": "E", "Q": "A"}
    pairs = {}
    for key, parameter in adapter.named_parameters():
        path, _, name = key.rpartition(".")
        pairs[key] = named[f"base_model.model.{path}.lora_{letters[name]}.default"]
        pairs[key].data.copy_(parameter.data.view_as(pairs[key]))
    ours = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    adapter.project_after(ours)
    optimizer = torch.optim.AdamW(pairs.values(), lr=1e-2, weight_decay=0.0)
    for step in range(1, 13):
        ours.zero_grad()
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        theirs(TOKENS, labels=TOKENS).loss.backward()
        ours.step()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        for key, parameter in adapter.named_parameters():
            expected = pairs[key].data.view_as(parameter)
            torch.testing.assert_close(parameter.data, expected, rtol=1e-4, atol=1e-5)
    lambdas = [p for key, p in adapter.named_parameters() if key.endswith("Lambda")]
    assert sum(int((p != 0).sum()) for p in lambdas) == 2 * len(lambdas)


def test_budget_falls_to_its_target() -> None:
    """From r a layer in the warm-up to the target at the end, never rising."""
    variant = AdaLoRA(**SCHEDULE)
    budgets = [variant.budget(step, layers=10) for step in range(2, 10)]
    assert budgets[0] == 40
    assert budgets[-1] == 20
    assert budgets == sorted(budgets, reverse=True)


def test_penalty_is_the_distance_from_orthonormal(tiny_llama: Callable[..., nn.Module]) -> None:
    """reg Σ (‖PᵀP - I‖² + ‖QQᵀ - I‖²), over all layers."""
    adapter = ll.attach(tiny_llama(), "adalora", r=3, reg=0.5, targets=r"down_proj$")
    total = 0.0
    for key, p in adapter.named_parameters():
        if not key.endswith("Lambda"):
            p = p.detach() if key.endswith("Q") else p.detach().T
            total += float((p @ p.T - torch.eye(3)).square().sum())
    assert math.isclose(adapter.penalty().item(), 0.5 * total, rel_tol=1e-5)


def test_goes_on_from_its_file(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    """A run that is saved and restored at any step ends in the same bits, choices included."""

    def run(stop: int) -> dict[str, torch.Tensor]:
        model = tiny_llama().train()
        adapter = ll.attach(model, "adalora", targets=r"down_proj$", **SCHEDULE)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-1)
        handle = adapter.project_after(optimizer)
        for step in range(12):
            if step == stop:
                handle.remove()
                adapter.save(tmp_path / "file")
                adapter.detach()
                adapter = ll.attach(model, "adalora", targets=r"down_proj$", **SCHEDULE)
                adapter.restore(tmp_path / "file")
                optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-1)
                handle = adapter.project_after(optimizer)
            optimizer.zero_grad()
            (model(TOKENS, labels=TOKENS).loss + adapter.penalty()).backward()
            optimizer.step()
        return {key: value.clone() for key, value in adapter.state_dict().items()}

    expected = run(stop=99)
    assert int(expected["shared:adalora.step:1"]) == 12
    for stop in (1, 6, 10):
        found = run(stop)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_published_counts() -> None:
    """DeBERTaV3-base, r = 12 on all linear layers at the start: LoRA's count and r more a layer."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(768, 3072) for _ in range(12)])
    found = ll.plan(model, "adalora", targets=r"\d+", r=12)
    assert found.parameters == 12 * 12 * (768 + 3072 + 1)
    assert found.macs_per_token == 12 * 12 * (768 + 3072)


def test_precision(half_precision: Callable[..., None]) -> None:
    """In bfloat16 and float16 the error of Δ is at most twice LoRA's."""
    half_precision("adalora")
