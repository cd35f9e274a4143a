"""Two processes with gloo train what one process trains, and files hold whole tensors."""

from __future__ import annotations

from pathlib import Path

import distributed_worker as here
import lora_lite as ll
import pytest
import torch
from two_processes import launch

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each way and variant, each trained in by the same two processes."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("ddp", "fsdp"):
        for variant in ("lora", "antipasto"):
            (folder / f"{mode}-{variant}").mkdir()
            here.prepared(variant)[1].save(folder / f"{mode}-{variant}" / "single")
    launch(WORKER, folder)
    return folder


@pytest.mark.parametrize("variant", ["lora", "antipasto"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(runs: Path, mode: str, variant: str) -> None:
    """Two processes on half of the rows each end with the parameters of one process on all rows.

    So gradients are reduced. Both hold the same, and the file loads onto a plain model. Attaching
    afterwards is refused; so is detaching, if the model is sharded.
    """
    folder = runs / f"{mode}-{variant}"
    model, adapter = here.prepared(variant)
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    here.train(model, adapter, here.data())
    expected = adapter.state_dict()
    states = [torch.load(folder / f"state{rank}") for rank in range(2)]
    for name, value in expected.items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)
    trained = [name for name, _ in adapter.named_parameters()]
    assert not any(torch.allclose(start[name], expected[name], atol=1e-4) for name in trained)
    for file in ("file", *(["slim"] if folder.name == "fsdp-antipasto" else [])):
        torch.manual_seed(0)
        fresh = here.Net()
        loaded = ll.load(fresh, folder / file).state_dict()
        assert loaded.keys() == expected.keys()
        for name in trained:
            assert torch.equal(loaded[name], states[0][name]), name
        torch.testing.assert_close(
            fresh(here.data()[0]), model(here.data()[0]), rtol=1e-3, atol=1e-4
        )
