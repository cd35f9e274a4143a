"""Run by torchrun in test_sharded.py: adapters on models that FSDP and DDP have prepared."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import leave

FIELDS = {"vb_lora": {"length": 4, "vectors": 6}}


class Net(nn.Module):
    """Two residual blocks of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Mixture(nn.Module):
    """Four experts in one parameter of three dimensions, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = False
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.nn.functional.linear(row, self.down_proj[e]) for e, row in enumerate(x)]
        return torch.stack(rows)


class Mixtures(nn.Module):
    """Two residual blocks of experts; row e of the input goes to expert e."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Mixture() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def attached(variant: str, value: float = 0.1) -> tuple[Net, ll.Adapter]:
    """The same model and adapter in every process."""
    model = Net()
    adapter = attach(model, variant)
    fill(adapter, value)
    return model, adapter


def attach(model: nn.Module, variant: str, **arguments: Any) -> ll.Adapter:
    """The variant with the fields that fit these small layers."""
    return ll.attach(model, variant, r=4, **FIELDS.get(variant, {}), **arguments)


def fill(adapter: ll.Adapter, value: float) -> None:
    """Add to every parameter, to each another multiple."""
    with torch.no_grad():
        for index, p in enumerate(adapter.parameters()):
            p.add_(value * (1 + index))


def inputs() -> Tensor:
    """A fixed batch."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def shard(model: nn.Module) -> None:
    """FSDP2, by blocks and as a whole."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def wrapped(model: nn.Module) -> nn.Module:
    """FSDP1, by blocks and as a whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def outcome(call: Callable[[], Any]) -> str:
    """What a call comes to: "done", or the error's class and text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two states are one, bit for bit and whole."""
    return state.keys() == expected.keys() and all(
        type(value) is Tensor and torch.equal(value, expected[name])
        for name, value in state.items()
    )


# --- what is tried: each function returns facts, by name


def fsdp2(variant: str, folder: Path) -> dict[str, Any]:
    """load_state_dict onto sharded tensors: a full state, a state of DTensors, a wrong one."""
    model, adapter = attached(variant)
    target, expected = attached(variant, 0.3)
    full = {name: value.clone() for name, value in expected.state_dict().items()}
    wanted = target(inputs())
    shard(model)
    adapter.load_state_dict(full)
    facts: dict[str, Any] = {
        "state": same(adapter.state_dict(), full),
        "sharded": all(hasattr(p, "full_tensor") for p in adapter.parameters()),
        "output": torch.allclose(model(inputs()), wanted, atol=1e-6),
    }
    zeros = {name: 0 * value for name, value in full.items()}
    adapter.load_state_dict(zeros)  # the outermost group is whole after a forward
    model.reshard()
    facts["kept"] = same(adapter.state_dict(), zeros)
    adapter.load_state_dict(full)
    sharded = dict(adapter.named_parameters())
    frozen = {name: value for name, value in full.items() if name not in sharded}
    fill(adapter, 0.1)
    moved = {name: value.clone() for name, value in adapter.state_dict().items()}
    dtensors = {name: p.detach().clone() for name, p in sharded.items()}
    adapter.load_state_dict(full)
    adapter.load_state_dict({**dtensors, **frozen})
    facts["dtensors"] = same(adapter.state_dict(), moved)
    name = next(iter(full))
    for wrong, value in {
        "nan": torch.full_like(full[name], torch.nan),
        "shape": full[name][:1],
        "overflow": torch.full_like(full[name], 1e300, dtype=torch.float64),
    }.items():
        facts[wrong] = outcome(lambda value=value: adapter.load_state_dict({**full, name: value}))
    facts["untouched"] = same(adapter.state_dict(), moved)
    adapter.save(folder / f"{variant}.fsdp2")
    dist.barrier()
    loaded = ll.load(Net(), folder / f"{variant}.fsdp2")
    facts["file"] = same(loaded.state_dict(), moved)
    return facts


def gradients(variant: str, _: Path) -> dict[str, Any]:
    """Outputs and gradients, sharded as before; inside of another module; and by blocks alone."""
    from torch.distributed.fsdp import fully_shard

    found = [computed(*attached(variant), is_sharded) for is_sharded in (False, True)]
    inner, _adapter = attached(variant)
    outer = nn.Sequential(inner)
    model, _adapter = attached(variant)
    for block in (*inner.blocks, *model.blocks):
        fully_shard(block)
    fully_shard(outer)
    return {
        "same": all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True)),
        "inside another": torch.allclose(outer(inputs()), found[0][0], atol=1e-5),
        "blocks alone": outcome(lambda: model(inputs())),
    }


def computed(model: nn.Module, adapter: ll.Adapter, is_sharded: bool) -> list[Tensor]:
    """The output, and the gradient of every parameter, whole."""
    if is_sharded:
        shard(model)
    output = model(inputs())
    output.square().mean().backward()
    found = [p.grad for p in adapter.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return [output.detach(), *whole]


def experts(variant: str, folder: Path) -> dict[str, Any]:
    """An adapter on experts: outputs, gradients and a file, sharded as before."""
    found = []
    for is_sharded in (False, True):
        model = Mixtures()
        adapter = attach(model, variant, targets="down_proj")
        fill(adapter, 0.1)
        found.append(computed(model, adapter, is_sharded))
    adapter.save(folder / f"{variant}.experts")
    dist.barrier()
    plain = Mixtures()
    ll.load(plain, folder / f"{variant}.experts")
    return {
        "same": all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True)),
        "file": torch.allclose(plain(inputs()), found[0][0], atol=1e-5),
    }


def fsdp1(variant: str, folder: Path) -> dict[str, Any]:
    """Everything that one does to an adapter, on a model that FSDP1 has wrapped."""
    model, adapter = attached(variant)
    expected = {name: value.clone() for name, value in adapter.state_dict().items()}
    wanted = model(inputs()).detach()
    outer = wrapped(model)
    facts: dict[str, Any] = {"output": torch.allclose(outer(inputs()), wanted, atol=1e-6)}
    path = folder / f"{variant}.fsdp1.{dist.get_rank()}"
    facts["save"] = outcome(lambda: adapter.save(path))
    facts["whole file"] = path.exists() and same(ll.load(Net(), path).state_dict(), expected)
    states: list[dict[str, Tensor]] = []
    facts["state_dict"] = outcome(lambda: states.append(adapter.state_dict()))
    facts["whole state"] = bool(states) and same(states[0], expected)
    facts["repr"] = outcome(lambda: repr(adapter))
    facts["attach"] = outcome(lambda: ll.attach(outer, "lora", name="late", r=2))
    facts["attach inside"] = outcome(lambda: ll.attach(model, "lora", name="late", r=2))
    facts["load"] = outcome(lambda: ll.load(outer, folder / "plain", name="late"))
    facts["detach"] = outcome(adapter.detach)
    outer(inputs()).square().mean().backward()
    facts["gradients"] = any(p.grad is not None for p in outer.parameters() if p.requires_grad)
    return facts


def fsdp1_summoned(variant: str, folder: Path) -> dict[str, Any]:
    """With the full parameters summoned, saving is exact."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, adapter = attached(variant)
    expected = {name: value.clone() for name, value in adapter.state_dict().items()}
    outer = wrapped(model)
    path = folder / f"{variant}.summoned.{dist.get_rank()}"
    with FullyShardedDataParallel.summon_full_params(outer):
        saved = outcome(lambda: adapter.save(path))
        state = outcome(lambda: None) if saved == "done" else saved
        whole = saved == "done" and same(adapter.state_dict(), expected)
    exact = path.exists() and same(ll.load(Net(), path).state_dict(), expected)
    return {"save": saved, "state": state, "whole": whole, "exact": exact}


def ddp_inside(variant: str, _: Path) -> dict[str, Any]:
    """Attaching to the module inside of a DDP, whose gradients nobody would reduce."""
    model, adapter = attached(variant)
    outer = nn.parallel.DistributedDataParallel(model)
    facts: dict[str, Any] = {
        "outside": outcome(lambda: ll.attach(outer, "lora", name="late", r=2)),
        "inside": outcome(lambda: ll.attach(model, "lora", name="late", r=2)),
    }
    assert adapter.name in ll.adapters(model)
    late = ll.adapters(model).get("late")
    if late is not None:
        fill(late, 0.1)
        outer(inputs() + dist.get_rank()).square().mean().backward()
        gradient = next(late.parameters()).grad
        every = [torch.zeros_like(gradient) for _ in range(dist.get_world_size())]
        dist.all_gather(every, gradient)
        facts["reduced"] = all(torch.equal(every[0], other) for other in every)
    return facts


def resumed(variant: str, _: Path) -> dict[str, Any]:
    """The state dict of a sharded model goes back, and another adapter's is refused."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, adapter = attached(variant)
    shard(model)
    expected = {name: value.clone() for name, value in adapter.state_dict().items()}
    state = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    again, other = attached(variant, 0.3)
    shard(again)
    set_model_state_dict(again, state)
    facts: dict[str, Any] = {"same": same(other.state_dict(), expected)}
    renamed = Net()
    attach(renamed, variant, name="other")
    shard(renamed)
    facts["another name"] = outcome(lambda: renamed.load_state_dict(state, strict=False))
    return facts


CASES = {
    f.__name__: f for f in (fsdp2, gradients, experts, fsdp1, fsdp1_summoned, ddp_inside, resumed)
}


def main() -> None:
    """torchrun ... sharded_worker.py FOLDER VARIANT...: writes what each process found as JSON."""
    folder, variants = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    if rank == 0:
        attached("lora")[1].save(folder / "plain")
    dist.barrier()
    found: dict[str, Any] = {}
    for variant in variants:
        for name, case in CASES.items():
            try:
                found[f"{name} {variant}"] = case(variant, folder)
            except Exception as error:  # a test of its own is to fail, not all of them
                found[f"{name} {variant}"] = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    (folder / f"facts{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
