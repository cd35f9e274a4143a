"""A tiny model with an adapter, a few batches, and trainers made for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant
from lora_lite_transformers import adapted
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

TARGETS = r"down_proj$"


class Held(Variant, name="held"):
    """Δy = v, held to v ≤ `most` after every step, with a penalty whose gradient is 1 everywhere.

    u takes part in nothing but the penalty, and decays; v does not.
    """

    most: float = 1e9

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,), decay=False), "u": TensorSpec((3,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"v": torch.zeros(site.d_out), "u": torch.ones(3)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["v"].expand_as(y) + 0 * t["u"].sum()

    def project(self, site: Site, t: Tensors) -> None:
        t["v"].clamp_(max=self.most)

    def penalty(self, site: Site, t: Tensors) -> Tensor:
        return t["u"].sum()


def state(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], expected[name]) for name in actual
    )


def moved(adapter: ll.Adapter, seed: int = 1) -> ll.Adapter:
    """The adapter with every parameter off its start, as after a first training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def rows(count: int = 16, length: int = 8) -> list[dict[str, Tensor]]:
    """Random tokens that the model learns to continue."""
    tokens = torch.randint(2, 32, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps of four rows, saved every two."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 0,
            **changes,
        }
    )


Run = tuple[Trainer, ll.Adapter]


@pytest.fixture
def make(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Run]:
    """Makes an adapted Trainer on a fresh model."""

    def build(variant: Any = "lora", fields: Any = None, **changes: Any) -> Run:
        set_seed(0)
        model = tiny_llama()
        adapter = ll.attach(model, variant, targets=TARGETS, **(fields or {}))
        options = {k: changes.pop(k) for k in ("eval_dataset", "callbacks") if k in changes}
        folder = Path(changes.pop("output_dir", tmp_path / "run"))
        trainer = adapted(Trainer)(
            model, args=arguments(folder, **changes), train_dataset=rows(), **options
        )
        return trainer, adapter

    return build
