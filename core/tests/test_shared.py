"""Tensors that all layers of an adapter share: there once, wherever one looks."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear


class Tied(Variant, name="tied"):
    """Δy = B (d ∘ A x); A is frozen and shared, B trained and shared, d each layer's own."""

    r: int = 3
    decays: bool = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            "A": TensorSpec((self.r, site.d_in), trainable=False, shared="A"),
            "B": TensorSpec((site.d_out, self.r), shared="up", decay=self.decays),
            "d": TensorSpec((self.r,)),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {
            "A": torch.randn(self.r, site.d_in, generator=rng("A")),
            "B": torch.randn(site.d_out, self.r, generator=rng("B")),
            "d": torch.zeros(self.r),
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(t["d"] * linear(x, t["A"]), t["B"])


class Net(nn.Module):
    """Three layers of 8 -> 8, then one of 8 -> 6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        y: Tensor = self.last(x)
        return y


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
ALL = r"layers|last"
KEYS = {"shared:tied.A:3x8", "shared:tied.up:8x3", "shared:tied.up:6x3"}


def attached(name: str = "default", **fields: int) -> tuple[Net, ll.Adapter]:
    """A model with an adapter off its start."""
    model = Net()
    adapter = ll.attach(model, Tied(**fields), targets=ALL, name=name)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.add_(0.1 * (1 + index))
    return model, adapter


def test_is_there_once() -> None:
    """Promise: a shared tensor is one parameter of the model, one entry of the state dict, and
    counted once, by adapter, plan and model alike; layers of another shape have another."""
    model, adapter = attached()
    trained = 8 * 3 + 6 * 3 + 4 * 3
    assert {key for key in adapter.state_dict() if key.startswith("shared:")} == KEYS
    assert adapter.num_parameters == trained
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert len([name for name in model.state_dict() if "tied_up" in name]) == 2
    plan = ll.plan(Net(), Tied(), targets=ALL)
    assert plan.parameters == trained
    assert plan.shared_parameters == 8 * 3 + 6 * 3
    assert "42 " in next(line for line in str(plan).splitlines() if line.startswith("shared"))


def test_gradient_is_the_sum_over_layers() -> None:
    """Promise: the gradient of a shared tensor is the sum of those that layers of their own would
    give it."""
    model, adapter = attached()
    model(X).square().sum().backward()
    grads = {key: p.grad for key, p in adapter.named_parameters()}
    b = adapter.state_dict()["shared:tied.up:8x3"].clone().requires_grad_()
    each = [b.detach().clone().requires_grad_() for _ in range(3)]
    state, x = adapter.state_dict(), X
    for index, layer in enumerate(model.layers):
        d = state[f"layers.{index}.d"]
        plain = linear(x, layer.weight, layer.bias)
        x = torch.tanh(plain + linear(d * linear(x, state["shared:tied.A:3x8"]), each[index]))
    inside = state["last.d"] * linear(x, state["shared:tied.A:3x8"])
    last = linear(inside, state["shared:tied.up:6x3"])
    (linear(x, model.last.weight, model.last.bias) + last).square().sum().backward()
    expected = sum(one.grad for one in each)
    torch.testing.assert_close(grads["shared:tied.up:8x3"], expected)


def test_start_depends_on_its_name_alone() -> None:
    """Promise: whichever layers are chosen, shared tensors start the same; two adapters, two names
    and two seeds do not."""
    start = ll.attach(Net(), Tied(), targets=ALL).state_dict()
    part = ll.attach(Net(), Tied(), targets=r"layers\.2|last").state_dict()
    for key in part.keys() & KEYS:
        assert torch.equal(part[key], start[key])
    for other in (
        ll.attach(Net(), Tied(), targets=ALL, seed=1),
        ll.attach(Net(), Tied(), targets=ALL, name="other"),
    ):
        for key in KEYS:
            assert not torch.equal(other.state_dict()[key], start[key])


def test_copies_are_apart_and_whole() -> None:
    """Promise: deep copies and pickles compute the same, share among their own layers, and nothing
    with the original."""
    model, _ = attached()
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(X), expected)
        theirs = dict(ll.adapters(again)["default"].named_parameters())
        with torch.no_grad():
            theirs["shared:tied.up:8x3"].zero_()
        moved = again(X)
        assert not torch.equal(moved, expected)
        assert torch.equal(model(X), expected)
        ll.detach(again)
        assert torch.equal(again(X), Net()(X))


def test_files_and_state(tmp_path: Path) -> None:
    """Promise: a file holds it once and gives back the same bits, to a fresh base, under another
    path and into an attached adapter; a file without it is refused by name."""
    model, adapter = attached()
    adapter.save(tmp_path / "file")
    assert {key for key in load_file(tmp_path / "file") if key.startswith("shared:")} == KEYS
    fresh = Net()
    ll.load(fresh, tmp_path / "file", variant=Tied)
    assert torch.equal(fresh(X), model(X))
    again = ll.attach(Net(), Tied(), targets=ALL)
    again.restore(tmp_path / "file")
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    renamed = nn.ModuleDict({"inner": Net()})
    found = ll.load(renamed, tmp_path / "file", variant=Tied, rename={"^": "inner."})
    assert found.sites.keys() == {f"inner.{path}" for path in adapter.sites}
    state = adapter.state_dict()
    del state["shared:tied.up:8x3"]
    with pytest.raises(ll.AdapterFileError, match=r"layers\.0\.B: missing"):
        adapter.load_state_dict(state)
    with pytest.raises(ll.AdapterFileError, match=r"shared:tied\.other:1x1: extra"):
        adapter.load_state_dict({**adapter.state_dict(), "shared:tied.other:1x1": torch.ones(1, 1)})


def test_optimizers_see_it_once() -> None:
    """Promise: param_groups has a shared tensor once, with the decay and the rate of its name."""
    model, adapter = attached()
    groups = ll.param_groups(model, weight_decay=0.1, lr={"up": 3.0})
    by_rate = {group.get("lr"): group["params"] for group in groups}
    assert [p.shape for p in by_rate[3.0]] == [(8, 3), (6, 3)]
    torch.optim.AdamW(groups, lr=1e-2)
    assert sum(len(group["params"]) for group in groups) == len(list(adapter.parameters()))


def test_detach_leaves_nothing() -> None:
    """Promise: after detach the model is what it was, and one adapter leaves the other's alone."""
    plain = Net()
    attributes = {name: set(module.__dict__) for name, module in plain.named_modules()}
    model, adapter = attached()
    other = ll.attach(model, Tied(r=2), targets=ALL, name="other")
    expected = {key: value.clone() for key, value in other.state_dict().items()}
    adapter.detach()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    model(X)
    other.detach()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(X), plain(X))


def test_rows_factors_and_compile() -> None:
    """Promise: rows with adapters of their own, low_rank, merged and torch.compile work as without
    shared tensors."""
    model, adapter = attached()
    ll.attach(model, Tied(r=2), targets=ALL, name="other")
    with ll.adapters_by_row(model, ["default", "other", None, None, "default"]):
        together = model(X)
    with adapter.disabled(), ll.adapters(model)["other"].disabled():
        torch.testing.assert_close(together[2:4], model(X)[2:4])
    ll.detach(model, "other")
    torch.testing.assert_close(together[[0, 4]], model(X)[[0, 4]])
    factors = adapter.low_rank()["last"]
    change = adapter.merged()["last"].weight - model.last.weight
    torch.testing.assert_close((factors.B @ factors.A).float(), change, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_is_refused_where_it_cannot_be() -> None:
    """Promise: two declarations of one tensor, a name that is none, and experts are refused before
    anything is changed."""
    model = Net()
    recipe = {"layers": Tied(), "last": Tied(decays=False)}
    ll.attach(model, recipe)  # of different shapes
    ll.detach(model)
    with pytest.raises(ll.LoraLiteError, match=r"'tied' declares the shared tensor 'up' in two"):
        ll.attach(model, {r"layers\.0": Tied(), r"layers\.1": Tied(decays=False)})
    assert torch.equal(model(X), Net()(X))
    with pytest.raises(ll.LoraLiteError, match=r"shared='a b'\) is not a name"):
        TensorSpec((2,), shared="a b")
