"""Run by torchrun in test_distributed.py.

Trains a small model under DDP or FSDP2, and writes what each process has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lora_lite as ll
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import leave


class Net(nn.Module):
    """Two residual blocks of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def prepared(variant: str) -> tuple[Net, ll.Adapter]:
    """The same model and adapter in every process."""
    torch.manual_seed(0)
    model = Net()
    fields = {"r": 4}
    adapter = ll.attach(model, variant, seed=5, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model, adapter


def data() -> Tensor:
    """Four batches of eight rows."""
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, adapter: ll.Adapter, batches: Tensor) -> None:
    """A few steps of SGD towards a fixed target."""
    optimizer = torch.optim.SGD(adapter.param_groups(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()


def ddp(variant: str, folder: Path, rank: int, world: int) -> None:
    """Each process trains on its rows; all end with the same parameters."""
    model, adapter = prepared(variant)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for refused in (
        lambda: ll.attach(wrapped, "lora", r=2, name="late"),
        lambda: ll.load(wrapped, folder / "single"),
        lambda: ll.attach(model, "lora", r=2, name="late"),  # the inner model
    ):
        with pytest.raises(ll.AdapterError, match="DistributedDataParallel"):
            refused()
    assert list(ll.adapters(wrapped)) == ["default"]
    train(wrapped, adapter, data()[:, rank::world])
    torch.save(adapter.state_dict(), folder / f"state{rank}")
    if rank == 0:
        ll.save(wrapped, folder / "file")


def fsdp(variant: str, folder: Path, rank: int, world: int) -> None:
    """Attached before sharding, trained, saved by all.

    Attaching and detaching afterwards is refused.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, adapter = prepared(variant)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    refusals = [
        lambda: ll.attach(model, "lora", r=2, name="late"),
        lambda: ll.load(model, folder / "single", name="late"),
        adapter.detach,
    ]
    for refused in refusals:
        with pytest.raises(ll.AdapterError, match="FSDP2"):
            refused()
    train(model, adapter, data()[:, rank::world])
    torch.save(adapter.state_dict(), folder / f"state{rank}")
    adapter.save(folder / "file")
    if variant == "antipasto":
        adapter.save(folder / "slim", derived=False)


def main() -> None:
    """torchrun ... distributed_worker.py FOLDER: a run for each of its folders MODE-VARIANT."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for folder in sorted(Path(sys.argv[1]).glob("*-*")):
        mode, variant = folder.name.split("-")
        run = {"ddp": ddp, "fsdp": fsdp}[mode]
        run(variant, folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
