"""Two processes: the Trainer with DDP and with FSDP2, and FSDP2 with accelerate and by hand, train
as one process does, and resume from checkpoints of adapters.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trainers_worker as here
from two_processes import launch

WORKER = Path(__file__).with_name("trainers_worker.py")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "dpo-ddp", "dpo-fsdp"])
def test_the_trainer_on_two_processes(tmp_path: Path, mode: str) -> None:
    """Losses, penalty and decay included, are those of one process on the same rows; checkpoints
    hold no model; a resumed run ends in the same bits, on both processes alike. So it is with DPO,
    whose reference is the policy itself.
    """
    if mode.startswith("dpo"):
        pytest.importorskip("trl")
    launch(WORKER, tmp_path, mode)
    run = here.compared if mode.startswith("dpo") else here.trained
    alone, adapter = run(tmp_path / "alone", "alone")
    records = [torch.load(tmp_path / f"record{rank}") for rank in range(2)]
    for record in records:
        if record["whole"]:  # the first process logs
            assert record["whole"] == pytest.approx(here.losses(alone), rel=1e-4)
            assert record["resumed"] == record["whole"]
        for name, value in adapter.state_dict().items():
            torch.testing.assert_close(record["state"][name], value, rtol=1e-3, atol=1e-4)
            assert torch.equal(record["resumed_state"][name], record["state"][name])
            assert torch.equal(records[0]["state"][name], record["state"][name])
    files = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "default.adapter.safetensors" in files
    assert not [name for name in files if name.startswith(("model", "pytorch_model"))]
    assert ("optimizer.bin" in files) == mode.endswith("fsdp")  # it was sharded


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From two processes with DDP to one: the rows of a step stay the same, and so do losses."""
    launch(WORKER, tmp_path, "ddp")
    alone, adapter = here.trained(tmp_path / "alone", "alone")
    resumed, again = here.trained(tmp_path, "alone", str(tmp_path / "checkpoint-2"))
    assert here.losses(resumed) == pytest.approx(here.losses(alone), rel=1e-4)
    for name, value in adapter.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_accelerate_saves_the_adapters_of_a_sharded_model(tmp_path: Path) -> None:
    """`register`: save_state writes no shard of the model, and load_state goes on to the bit."""
    launch(WORKER, tmp_path, "accelerate")
    for rank in range(2):
        record = json.loads((tmp_path / f"record{rank}.json").read_text())
        assert record["resumed"] == record["expected"]
        assert record["first"] != record["expected"]
    saved = tmp_path / "saved"
    assert (saved / "adapters" / "default.adapter.safetensors").is_file()
    assert not list(saved.glob("pytorch_model*"))


def test_fully_shard_by_hand(tmp_path: Path) -> None:
    """save_all and restore_all on sharded parameters: the second half of the run, to the bit."""
    launch(WORKER, tmp_path, "hand")
    for rank in range(2):
        record = json.loads((tmp_path / f"record{rank}.json").read_text())
        assert record["resumed"] == record["expected"]
        assert record["first"] != record["expected"]
        assert min(record["alphas"]) == 0.0  # held to the range by project
        assert max(record["alphas"]) <= 1.0
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    adapters = {f"{name}.adapter.safetensors" for name in ("default", "held", "other")}
    assert names == adapters | {"adapters.json"}
