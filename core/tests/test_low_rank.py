"""The change of an adapter as low-rank factors, and as merged weights."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
from lora_lite.change import LayerChange
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Guard = Callable[[nn.Module], AbstractContextManager[None]]
Case = tuple[str, dict[str, Any], int]

# Every method of low rank with its fields, and the rank of its change.
LOW_RANK: list[Case] = [
    ("lora", {"r": 3, "alpha": 5.0}, 3),
    ("lora", {"r": 3, "alpha": 5.0, "rslora": True, "dropout": 0.5}, 3),
    ("eva", {"r": 3}, 3),
    ("pissa", {"r": 3}, 6),
    ("delora", {"r": 3, "start": "zero_b"}, 3),
    ("delora", {"r": 3, "start": "subtract", "norm": "scalar"}, 6),
    ("lora_xs", {"r": 3, "alpha": 2.0}, 3),
    ("hra", {"r": 4}, 4),
    ("antipasto", {"r": 4, "rotate_basis": "V"}, 4),
    ("antipasto", {"r": 4, "rotate_basis": "both"}, 4),
    ("antipasto_gain", {"r": 4}, 4),
    ("antipasto_mix", {"r": 4, "k": 2, "gain": False}, 2),
    ("antipasto_ablate", {"r": 4, "k": 2}, 2),
]
FULL_RANK: list[Case] = [
    ("dora", {"r": 3}, 0), ("ia3", {}, 0), ("ia3_ff", {}, 0), ("road", {"group_size": 4}, 0)
]  # fmt: skip


def ids(case: Case) -> str:
    name, fields, _ = case
    return " ".join([name, *(f"{field}={value}" for field, value in fields.items())])


def adapted(model: nn.Module, case: Case, **options: Any) -> ll.Adapter:
    """An adapter with random tensors, as of training, in float64 unless told otherwise."""
    name, fields, _ = case
    calibration = [torch.randn(40, 8).to(next(model.parameters()).dtype)] if name == "eva" else None
    arguments = {"targets": "up|down", "dtype": torch.float64, **options}
    adapter = ll.attach(model, name, calibration=calibration, **arguments, **fields)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.rand(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter))
    adapter.project()
    return adapter


def closed_form(adapter: ll.Adapter, path: str) -> Tensor:
    """ΔW (d_out, d_in) by the formula of each method's paper."""
    attachment, module = adapter._state.attachments[path], adapter._modules[path]
    site, v = Site(attachment.layer, module), adapter.sites[path]
    t: dict[str, Tensor] = {n: p.detach().double() for n, p in attachment.stored(module).items()}
    w = site.weight().double()
    fields: Any = v
    if v.name in ("lora", "eva"):
        return fields.alpha / (math.sqrt(v.r) if fields.rslora else v.r) * t["B"] @ t["A"]
    if v.name == "pissa":
        return (t["B0"] + t["dB"]) @ (t["A0"] + t["dA"]) - t["B0"] @ t["A0"]
    if v.name == "delora" and fields.start == "zero_b":
        return _unit(t["A"], t["B"], fields.strength + t["lambda_offset"]) * t["w"]
    if v.name == "delora":
        now = _unit(t["A0"] + t["dA"], t["B0"] + t["dB"], fields.strength + t["lambda_offset"])
        return (now - _unit(t["A0"], t["B0"], fields.strength)) * t["w"]
    if v.name == "lora_xs":
        u = t["B"]
        return fields.alpha / v.r * u @ t["R"] @ u.T @ w
    if v.name == "hra":
        turned = torch.eye(site.d_in, dtype=torch.float64)
        for row in t["U"]:
            turned = turned - 2 * turned @ torch.outer(row, row) / row.square().sum()
        return w @ turned - w
    return _antipasto(fields, t, w)


def _unit(a: Tensor, b: Tensor, strength: Tensor | float) -> Tensor:
    unit_a, unit_b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=0)
    return strength / len(a) * unit_b @ unit_a


def _antipasto(v: Any, t: dict[str, Tensor], w: Tensor) -> Tensor:
    u = t["U"]
    if v.name == "antipasto_ablate":
        o = u @ torch.linalg.qr(t["C"]).Q
        return -o @ torch.diag(t["alpha"]) @ o.T @ w
    rows = u.T @ w  # diag(S) P
    p = rows / t["S"][:, None]
    if v.name == "antipasto_gain":
        return u @ torch.diag(torch.nn.functional.elu(t["g"])) @ rows
    if v.name == "antipasto_mix":
        return u @ t["B"] @ t["A"] @ p
    core = torch.diag(t["S"] + t["delta"])
    if "theta_V" in t:
        core = core @ _rotation(v, t["theta_V"])
    if "theta_U" in t:
        core = _rotation(v, t["theta_U"]).T @ core
    return u @ (core - torch.diag(t["S"])) @ p


def _rotation(v: Any, theta: Tensor) -> Tensor:
    limit = 2 * math.tan(v.max_angle / 2)
    blocks = []
    for angles in theta:
        x = torch.zeros(v.block_size, v.block_size, dtype=torch.float64)
        rows, columns = torch.triu_indices(v.block_size, v.block_size, 1)
        x[rows, columns] = limit / 2 * torch.tanh(angles / 2 / limit)
        x = x - x.T
        identity = torch.eye(v.block_size, dtype=torch.float64)
        blocks.append(torch.linalg.inv(identity - x) @ (identity + x))
    return torch.block_diag(*blocks)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", LOW_RANK, ids=ids)
def test_the_factors_are_the_closed_form(blocks: Make, case: Case, untouched: Guard) -> None:
    """B A is ΔW by the paper's formula to 1e-12, of its exact rank; the model is not touched."""
    model = blocks().double()
    adapter = adapted(model, case)
    with untouched(model):
        factors = adapter.low_rank()
    assert list(factors) == list(adapter.sites)
    for path, found in factors.items():
        assert distance(found.B @ found.A, closed_form(adapter, path)) < 1e-12
        assert found.rank == case[2]
        assert found.offset is None
        assert found.error == 0


@pytest.mark.parametrize("case", [*LOW_RANK, *FULL_RANK], ids=ids)
def test_merged_layers_do_what_the_adapted_model_does(
    blocks: Make, case: Case, untouched: Guard
) -> None:
    """A plain model with the merged weights and biases has the adapted model's outputs."""
    model, plain = blocks().double(), blocks().double()
    adapter = adapted(model.eval(), case)
    adapter.scale = 0.7
    with untouched(model):
        merged = adapter.merged()
    with torch.no_grad():
        for path, layer in merged.items():
            module = plain.get_submodule(path)
            module.weight.copy_(layer.weight)
            assert (layer.bias is None) == (module.bias is None)
            if layer.bias is not None:
                module.bias.copy_(layer.bias)
        x = torch.randn(5, 8, dtype=torch.float64)
        assert float((model(x) - blocks().double()(x)).abs().max()) > 1e-3
        assert distance(plain(x), model(x)) < 1e-12


@pytest.mark.parametrize("case", FULL_RANK, ids=ids)
def test_full_rank_is_refused_by_name_or_truncated(blocks: Make, case: Case) -> None:
    """Every layer of full rank is named with the way out; rank= gives the best part and its error.

    The best approximation of rank k is that of the singular value decomposition.
    """
    adapter = adapted(blocks().double(), case)
    with pytest.raises(ll.AdapterError, match="changed by a matrix of full rank") as caught:
        adapter.low_rank()
    assert len(caught.value.details) == len(adapter.sites)
    assert 'format="merged"' in str(caught.value)
    assert "rank=" in str(caught.value)
    merged = adapter.merged()
    for path, found in adapter.low_rank(rank=3).items():
        delta = merged[path].weight - adapter._modules[path].weight
        singular = torch.linalg.svdvals(delta)
        best = float(singular[3:].norm() / singular.norm())
        assert found.rank == 3
        assert distance(found.B @ found.A, delta) == pytest.approx(best, rel=1e-6)
        assert found.error == pytest.approx(best, rel=1e-6)


def test_a_wide_layer_is_truncated_without_its_whole_change() -> None:
    """On layers wider than 256 the largest part is near the best one, and the error about right."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(400, 300)]).double()
    adapter = adapted(model, ("dora", {"r": 4}, 0), targets="0")
    with pytest.raises(ll.AdapterError, match="1 of 1 layers"):
        adapter.low_rank()
    found = adapter.low_rank(rank=40)["0"]
    delta = adapter.merged()["0"].weight - model[0].weight
    singular = torch.linalg.svdvals(delta)
    lost = distance(found.B @ found.A, delta)
    assert lost < 1.05 * float(singular[40:].norm() / singular.norm())
    assert found.error == pytest.approx(lost, rel=0.1)


def test_more_rank_than_first_probed() -> None:
    """A rank above the first number of probes is found, and rank= above it changes nothing."""
    model = nn.ModuleList([nn.Linear(100, 120)]).double()
    adapter = adapted(model, ("lora", {"r": 40}, 40), targets="0")
    exact, enough = adapter.low_rank()["0"], adapter.low_rank(rank=40)["0"]
    assert exact.rank == enough.rank == 40
    assert torch.equal(exact.A, enough.A)
    assert distance(exact.B @ exact.A, closed_form(adapter, "0")) < 1e-12


@pytest.mark.parametrize("case", LOW_RANK, ids=ids)
def test_a_fresh_adapter_has_no_rank(blocks: Make, case: Case) -> None:
    """At its start a method that changes nothing, or rounding, has factors without rows."""
    name, fields, _ = case
    calibration = [torch.randn(40, 8)] if name == "eva" else None
    adapter = ll.attach(blocks(), name, targets="up|down", calibration=calibration, **fields)
    expected = 2 if name == "antipasto_ablate" else 0  # which starts by removing something
    assert {found.rank for found in adapter.low_rank().values()} == {expected}


def test_scale_disabled_training_and_neighbours(blocks: Make) -> None:
    """The factors are of the present scale, without dropout, of this adapter alone, on or off."""
    model = blocks().double().train()
    adapter = adapted(model, ("lora", {"r": 2, "dropout": 0.5}, 2))
    ll.attach(model, "ia3", name="other", targets="up|down")
    whole = {path: found.B @ found.A for path, found in adapter.low_rank().items()}
    adapter.scale, adapter.enabled = 0.25, False
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for path, found in adapter.low_rank().items():
            assert distance(found.B @ found.A, whole[path] / 4) < 1e-12
    assert model.training


def test_half_precision_bases_are_rounded_once(blocks: Make) -> None:
    """On a bfloat16 base the merged weight is W + ΔW of float64, rounded to bfloat16."""
    model = blocks().bfloat16()
    adapter = adapted(model, ("lora", {"r": 2}, 2), dtype=torch.float32)
    for path, layer in adapter.merged().items():
        w = adapter._modules[path].weight.detach()
        assert torch.equal(layer.weight, (w.double() + closed_form(adapter, path)).bfloat16())


class Kink(Variant, name="kink"):
    """Not linear in x: Δy = a relu(x₀)."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"a": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"a": torch.ones(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x[..., :1]) * t["a"]


class Shift(Kink, name="shift"):
    """An offset alone: Δy = a."""

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["a"].expand_as(y)


def test_what_is_not_linear_is_refused(blocks: Make) -> None:
    """A change that no matrix can hold is never written as one."""
    adapter = ll.attach(blocks(), Kink(), targets="up|down")
    for ask in (adapter.low_rank, adapter.merged, lambda: adapter.low_rank(rank=1)):
        with pytest.raises(ll.AdapterError, match="kink changes the output by something"):
            ask()


def test_an_offset_alone(blocks: Make) -> None:
    """A variant that only shifts the output has no rank; the merged layer gets a bias."""
    adapter = ll.attach(blocks(), Shift(), targets="up|down")
    for path, found in adapter.low_rank().items():
        assert found.rank == 0
        assert found.offset is not None
        merged = adapter.merged()[path]
        module = adapter._modules[path]
        before = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()
        torch.testing.assert_close(merged.bias, 1 + before)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_a_rank_that_is_none(blocks: Make, rank: Any) -> None:
    with pytest.raises(ll.AdapterError, match=r"rank=.* is not a whole number"):
        ll.attach(blocks(), "lora", r=2).low_rank(rank=rank)


def test_a_detached_adapter_says_so(blocks: Make) -> None:
    adapter = ll.attach(blocks(), "lora", r=2)
    adapter.detach()
    for ask in (adapter.low_rank, adapter.merged):
        with pytest.raises(ll.AdapterError, match="is detached"):
            ask()


def test_the_change_is_that_of_the_layer(blocks: Make) -> None:
    """`LayerChange` is the adapted layer's output less the base's, for input and output deltas."""
    model = blocks().double().eval()
    adapter = adapted(model, ("hra", {"r": 2}, 2))
    for path, attachment in adapter._state.attachments.items():
        module = model.get_submodule(path)
        x = torch.randn(3, attachment.layer.d_in, dtype=torch.float64)
        with adapter.disabled():
            base = module(x)
        change = LayerChange(attachment, module)
        torch.testing.assert_close(change(x), module(x) - base)
        torch.testing.assert_close(change(x, x @ module.weight.T), change(x))
