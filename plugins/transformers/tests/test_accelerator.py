"""accelerate's own checkpoints, with adapters in place of models.

Sharded models need several processes: see `tests/test_trainers_distributed.py` of the repository.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lora_lite as ll
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from lora_lite_transformers import accelerator as ours
from lora_lite_transformers import register
from torch import nn

from .conftest import TARGETS, same, state

Make = Callable[..., nn.Module]
TOKENS = torch.randint(2, 32, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """accelerate keeps its state in singletons."""
    yield
    for singleton in (AcceleratorState, GradientState, PartialState):
        singleton._reset_state()


class Run:
    """A model with an adapter, a small model without, their optimizers and a schedule."""

    def __init__(self, tiny_llama: Make, **fields: int) -> None:
        self.accelerator = Accelerator(cpu=True)
        register(self.accelerator)
        model = tiny_llama()
        self.adapter = ll.attach(model, "lora", targets=TARGETS, **{"r": 2, **fields})
        torch.manual_seed(0)
        plain = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(ll.param_groups(model, 0.1), lr=1e-2)
        other = torch.optim.SGD(plain.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        prepared = self.accelerator.prepare(model, optimizer, schedule, plain, other)
        self.model, self.optimizer, self.schedule, self.plain, self.other = prepared

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = self.model(input_ids=TOKENS, labels=TOKENS).loss
            loss = loss + self.plain(torch.ones(8)).square().mean()
            self.accelerator.backward(loss)
            for optimizer in (self.optimizer, self.other):
                optimizer.step()
                optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.item())
        return losses


def test_a_run_from_load_state_goes_on_to_the_same_bits(tiny_llama: Make, tmp_path: Path) -> None:
    """Adapters, optimizers, schedules, and models that have no adapter."""
    run = Run(tiny_llama)
    run.steps(3)
    run.accelerator.save_state(str(tmp_path))
    expected, end = run.steps(3), state(run.adapter)
    again = Run(tiny_llama)
    again.accelerator.load_state(str(tmp_path))
    assert again.steps(3) == expected
    assert same(state(again.adapter), end)


def test_the_folder_holds_no_adapted_model(tiny_llama: Make, tmp_path: Path) -> None:
    """The file of the plain model is there; of the adapted one there are the adapters alone."""
    run = Run(tiny_llama)
    run.accelerator.save_state(str(tmp_path))
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert "adapters/default.adapter.safetensors" in names
    weights = [name for name in names if name.startswith(("model", "pytorch_model"))]
    assert len(weights) == 1
    assert (tmp_path / weights[0]).stat().st_size < 2000


def test_the_state_of_another_adapter_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    """`load_state` is as strict as `restore_all`."""
    Run(tiny_llama).accelerator.save_state(str(tmp_path))
    other = Run(tiny_llama, r=4)
    with pytest.raises(ll.AdapterFileError, match="r=2 in the file, r=4 in the model"):
        other.accelerator.load_state(str(tmp_path))


def test_the_functions_that_are_exchanged_are_there_with_the_same_parameters() -> None:
    """An accelerate that renames or changes one is seen here, and not in a user's checkpoint."""
    for name, parameters in ours.PRIVATE.items():
        signature = inspect.signature(getattr(ours.accelerators, name))
        assert tuple(signature.parameters)[:3] == parameters
        assert tuple(signature.parameters)[4] == "model_index"
        assert f"{name}(self.state.fsdp_plugin, self, model, " in inspect.getsource(Accelerator)


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process sees a whole adapter there; the error names the way out."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    plugin = SimpleNamespace(fsdp_version=1)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ll.AdapterError, match="fsdp_version=2"):
        register(accelerator)
