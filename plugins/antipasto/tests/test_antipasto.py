"""What is special to AntiPaSTO: the explicit formula of all arms, counts, file sizes, the scale, choice of directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_antipasto import AntiPaSTO
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ARMS = ("V", "U", "both", "none")


def one_layer(d_in: int, d_out: int, bias: bool, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A model that is one linear layer with fixed weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, d_out, bias=bias, dtype=dtype))


def randomize(adapter: ll.Adapter, size: float = 0.3) -> dict[str, Tensor]:
    """Give every trainable tensor random values, and return them by tensor name."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in adapter.named_parameters():
            p.copy_(size * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return {name.rpartition(".")[2]: p.detach().double() for name, p in adapter.named_parameters()}


def rotation(theta: Tensor, block: int, max_angle: float, scale: float) -> Tensor:
    """R as one dense matrix, written with (I - X)⁻¹ (I + X) plane by plane, independently of the plugin's code."""
    limit = 2 * math.tan(max_angle / 2)
    blocks = []
    for angles in theta:
        x = torch.zeros(block, block, dtype=torch.float64)
        planes = iter(angles)
        for i in range(block):
            for j in range(i + 1, block):
                entry = scale / 2 * limit * math.tanh(float(next(planes)) / 2 / limit)
                x[i, j], x[j, i] = entry, -entry
        identity = torch.eye(block, dtype=torch.float64)
        blocks.append(torch.linalg.inv(identity - x) @ (identity + x))
    return torch.block_diag(*blocks)


def explicit_weight(w: Tensor, variant: AntiPaSTO, t: dict[str, Tensor], scale: float) -> Tensor:
    """U R_uᵀ diag(S + c δ) R_v V + W_res."""
    u, s, v = ll.top_r_svd(w, variant.r, variant.svd)
    eye = torch.eye(variant.r, dtype=torch.float64)
    r_u, r_v = (
        rotation(t[name], variant.block_size, variant.max_angle, scale) if name in t else eye for name in ("theta_U", "theta_V")
    )
    residual = w - u @ torch.diag(s) @ v
    return u @ r_u.T @ torch.diag(s + scale * t["delta"]) @ r_v @ v + residual


@given(
    arm=st.sampled_from(ARMS),
    shape=st.sampled_from([(24, 12), (12, 24), (16, 16)]),  # from y, from x, from y
    bias=st.booleans(),
    block=st.sampled_from([2, 3, 4, 6]),
    scale=st.sampled_from([1.0, -1.0, 0.37, 2.5]),
    max_angle=st.floats(0.1, 3.0),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_arm_is_the_explicit_formula(
    arm: Any, shape: tuple[int, int], bias: bool, block: int, scale: float, max_angle: float
) -> None:
    """The delta equals U R_uᵀ (S + c δ) R_v V + W_res, dense and in float64: all arms, both routes, with or without bias."""
    model = one_layer(*shape, bias)
    variant = AntiPaSTO(r=12, rotate_basis=arm, block_size=block, max_angle=max_angle)
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64)
    t = randomize(adapter)
    adapter.scale = scale
    x = torch.randn(7, shape[0], dtype=torch.float64)
    layer = model[0]
    expected = x @ explicit_weight(layer.weight, variant, t, scale).T + (layer.bias if bias else 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, x @ layer.weight.T + (layer.bias if bias else 0), atol=1e-2)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_minus_scale_undoes_the_rotation(arm: Any, shape: tuple[int, int]) -> None:
    """R(-s) = R(s)⁻¹: with δ = 0, adapting a weight at scale s and the result at scale -s gives the weight back."""
    w = one_layer(*shape, bias=False)[0].weight.detach()
    variant = AntiPaSTO(r=8, rotate_basis=arm)
    model = one_layer(*shape, bias=False)
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64)
    t = randomize(adapter)
    for name, p in adapter.named_parameters():
        if name.endswith("delta"):
            nn.init.zeros_(p)
    x = torch.eye(shape[0], dtype=torch.float64)
    u, s, v = ll.top_r_svd(w, 8)
    residual = w - u @ torch.diag(s) @ v
    cores = []
    for scale in (0.8, -0.8):
        adapter.scale = scale
        cores.append(u.T @ (model(x).T - residual) @ v.T)  # R_uᵀ S R_v
    if arm == "both":  # the two rotations do not commute with S: compare with the rotations themselves
        r_u, r_v = (rotation(t[n], 4, variant.max_angle, 0.8) for n in ("theta_U", "theta_V"))
        torch.testing.assert_close(cores[0], r_u.T @ torch.diag(s) @ r_v)
        torch.testing.assert_close(cores[1], r_u @ torch.diag(s) @ r_v.T)
        return
    forth, back = (core / s[:, None] if arm == "V" else core / s for core in cores)
    torch.testing.assert_close(forth @ back, torch.eye(8, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert arm == "none" or not torch.allclose(forth, torch.eye(8, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize("arm", ARMS)
def test_the_scale_fades(arm: Any) -> None:
    """Scale 0 is the base, and the change grows steadily with the scale."""
    model = one_layer(24, 12, bias=True)
    x = torch.randn(5, 24, dtype=torch.float64)
    base = model(x)
    adapter = ll.attach(model, AntiPaSTO(r=12, rotate_basis=arm), targets="0", dtype=torch.float64)
    randomize(adapter)
    sizes = []
    for scale in (0.0, 0.25, 0.5, 1.0):
        adapter.scale = scale
        sizes.append(float((model(x) - base).detach().norm()))
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.5 * sizes[3]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_macs_are_those_of_the_flop_counter(arm: Any, shape: tuple[int, int], bias: bool) -> None:
    """Declared MACs a token are the slope of torch's FlopCounterMode between 8 and 16 tokens, and those a forward are products
    of `prepare`, which only b U and the product of the two rotations are.
    """
    model = one_layer(*shape, bias, torch.float32)
    adapter = ll.attach(model, AntiPaSTO(r=8, rotate_basis=arm), targets="0")

    def added(tokens: int) -> int:
        counts = []
        for active in (True, False):
            adapter.scale = 1.0
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                if active:
                    model(torch.randn(tokens, shape[0]))
                else:
                    with adapter.disabled():
                        model(torch.randn(tokens, shape[0]))
            counts.append(counter.get_total_flops())
        return (counts[0] - counts[1]) // 2

    slope = (added(16) - added(8)) // 8
    assert adapter.macs_per_token == slope
    assert adapter.macs_per_forward == added(8) - 8 * slope


def test_published_counts() -> None:
    """24 x (3584 -> 1024), r = 256, block 4: exactly 15,360 parameters and 12.6M MACs a token (2 r d_out + r bs each)."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)}) for _ in range(24)])
    found = ll.plan(model, "antipasto", targets="down_proj$")
    assert len(found.placements) == 24
    assert found.parameters == 15_360
    assert found.macs_per_token == 24 * (2 * 256 * 1024 + 256 * 4) == 12_607_488
    assert found.macs_per_forward == 0
    assert {arm: ll.plan(model, AntiPaSTO(rotate_basis=arm)).parameters // 24 for arm in ARMS} == {
        "V": 640,
        "U": 640,
        "both": 1024,
        "none": 256,
    }


@pytest.mark.slow
def test_slim_file_of_the_published_shapes_is_under_100_kb(tmp_path: Path) -> None:
    """The 15,360 numbers and all that verifies the left-out tensors fit into 100 KB, with names as long as a real model's."""
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(3584, 1024, bias=False)})}) for _ in range(24)]
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})}).bfloat16()
    adapter = ll.attach(model, "antipasto", targets="down_proj$")
    adapter.save(tmp_path / "slim.safetensors", derived=False)
    assert (tmp_path / "slim.safetensors").stat().st_size < 100_000


def test_slim_file_grows_by_little_a_layer(tmp_path: Path) -> None:
    """The quick form of the test above: the fixed part and the part a layer, measured on 2 and 4 thin layers of equal r."""
    sizes = []
    for depth in (2, 4):
        layers = [nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(264, 256, bias=False)})}) for _ in range(depth)]
        model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})
        adapter = ll.attach(model, "antipasto", targets="down_proj$")
        randomize(adapter)
        adapter.save(tmp_path / "slim.safetensors", derived=False)
        sizes.append((tmp_path / "slim.safetensors").stat().st_size)
    a_layer = (sizes[1] - sizes[0]) / 2
    assert sizes[0] + 22 * a_layer < 100_000


@pytest.mark.parametrize("arm", ARMS)
def test_full_file_reloads_bitwise_and_slim_file_within_1e_4(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, arm: Any
) -> None:
    """A full file gives the same bits of the logits; a slim one derives U, S, V again and is within 1e-4 of the logits."""
    tokens = torch.tensor([[5, 9, 3, 7, 1, 2]])
    model = tiny_llama(attention_bias=True).eval()
    adapter = ll.attach(model, AntiPaSTO(r=8, rotate_basis=arm))
    randomize(adapter)
    logits = model(tokens).logits
    adapter.save(tmp_path / "full.safetensors")
    adapter.save(tmp_path / "slim.safetensors", derived=False)
    assert not torch.equal(logits, tiny_llama(attention_bias=True).eval()(tokens).logits)
    for file in ("full", "slim"):
        fresh = tiny_llama(attention_bias=True).eval()
        ll.load(fresh, tmp_path / f"{file}.safetensors")
        again = fresh(tokens).logits
        assert torch.equal(again, logits) if file == "full" else torch.allclose(again, logits, rtol=0, atol=1e-4)


def test_slim_file_notices_another_basis(tmp_path: Path, untouched: Callable[[nn.Module], Any]) -> None:
    """Where the basis comes out differently, a slim file is refused even with check_base=False, and nothing is attached."""
    model = one_layer(24, 12, bias=False, dtype=torch.float32)
    ll.attach(model, AntiPaSTO(r=8), targets="0").save(tmp_path / "slim.safetensors", derived=False)
    other = one_layer(24, 12, bias=False, dtype=torch.float32)
    with torch.no_grad():  # swap two singular directions: the weight's spectrum stays
        u, s, v = torch.linalg.svd(other[0].weight, full_matrices=False)
        s[[0, 1]] = s[[1, 0]]
        other[0].weight.copy_(u @ torch.diag(s) @ v)
    with untouched(other), pytest.raises(ll.BaseMismatchError, match=r"come out differently.*derived=True.*\n  0\.U"):
        ll.load(other, tmp_path / "slim.safetensors", check_base=False)


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_activation_picks_the_directions_with_the_largest_output_variance(shape: tuple[int, int]) -> None:
    """select="activation" keeps the r coordinates of Uᵀ y with the largest variance; compared with brute force."""
    model = one_layer(*shape, bias=True, dtype=torch.float32)
    w = model[0].weight.detach()
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    batches = [(torch.randn(2, 9, len(v)) * torch.linspace(0.1, 9, len(v))) @ v + 2 for _ in range(5)]
    y = torch.cat(batches).reshape(-1, shape[0]) @ w.T
    expected = (y @ u).var(0).topk(4).indices.sort().values
    assert expected.tolist() != [0, 1, 2, 3]  # else "top" would pass too
    adapter = ll.attach(model, AntiPaSTO(r=4, select="activation"), targets="0", calibration=batches)
    kept = adapter.state_dict()["0.U"]
    torch.testing.assert_close((kept * u[:, expected]).sum(0).abs(), torch.ones(4), rtol=0, atol=1e-4)


def test_activation_statistics_survive_a_large_mean() -> None:
    """Features far from 0, as large language models have them, do not drown the variances in rounding."""
    model = one_layer(12, 24, bias=False, dtype=torch.float32)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 12, generator=rng) * torch.linspace(0.05, 1, 12)
    offset = 10_000 * torch.randn(12, generator=rng)
    u, _, _ = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    exact = (x.double() @ model[0].weight.detach().double().T @ u).var(0).topk(4).indices.sort().values
    adapter = ll.attach(model, AntiPaSTO(r=4, select="activation"), targets="0", calibration=list((x + offset).split(100)))
    kept = adapter.state_dict()["0.U"].double()
    torch.testing.assert_close((kept * u[:, exact]).sum(0).abs(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-3)


def test_activation_loads_without_data_and_refuses_a_slim_file(tmp_path: Path) -> None:
    """What calibration data chose cannot be derived from the base: the file is full, and loading needs no data."""
    model = one_layer(24, 12, bias=True, dtype=torch.float32)
    adapter = ll.attach(model, "antipasto", r=4, select="activation", targets="0", calibration=[torch.randn(50, 24)])
    randomize(adapter)
    x = torch.randn(3, 24)
    with pytest.raises(ll.AdapterFileError, match=r"derived=False.*activation"):
        adapter.save(tmp_path / "slim.safetensors", derived=False)
    assert not list(tmp_path.iterdir())
    adapter.save(tmp_path / "full.safetensors")
    fresh = one_layer(24, 12, bias=True, dtype=torch.float32)
    ll.load(fresh, tmp_path / "full.safetensors")
    assert torch.equal(fresh(x), model(x))


def test_too_few_calibration_tokens_are_an_error(untouched: Callable[[nn.Module], Any]) -> None:
    """Fewer tokens than directions cannot rank them; the error says how many were seen."""
    model = one_layer(24, 12, bias=True, dtype=torch.float32)
    with untouched(model), pytest.raises(ll.CalibrationError, match="r=4 directions and saw 3"):
        ll.attach(model, "antipasto", r=4, select="activation", targets="0", calibration=[torch.randn(3, 24)])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_a_weight_of_low_rank_gives_finite_values(shape: tuple[int, int], rank: int) -> None:
    """Directions with singular value 0 are left alone where 1 / S would be infinite: no NaN, forward or backward."""
    model = one_layer(*shape, bias=True, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(shape[1], rank) @ torch.randn(rank, shape[0]))
    adapter = ll.attach(model, "antipasto", r=8, targets="0")
    randomize(adapter)
    y = model(torch.randn(5, shape[0]))
    y.square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@given(theta=st.floats(-1e4, 1e4), max_angle=st.floats(0.01, 3.1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_max_angle_bounds_a_rotation_of_two(theta: float, max_angle: float) -> None:
    """For blocks of 2 no θ turns further than max_angle."""
    model = one_layer(6, 4, bias=False)
    adapter = ll.attach(model, AntiPaSTO(r=2, block_size=2, max_angle=max_angle), targets="0", dtype=torch.float64)
    for name, p in adapter.named_parameters():
        if name.endswith("theta_V"):
            nn.init.constant_(p, theta)
    u, s, v = ll.top_r_svd(model[0].weight.detach(), 2)
    adapted = model(torch.eye(6, dtype=torch.float64)).T.detach()
    turned = (u.T @ adapted @ v.T) / s[:, None]  # R
    angle = abs(math.atan2(float(turned[0, 1]), float(turned[0, 0])))
    assert angle <= max_angle + 1e-5
    if abs(theta) >= 1e3:
        assert angle == pytest.approx(max_angle, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"r": 13}, r"r: 13 is larger than this layer allows; the largest possible is 12"),
        ({"r": 10}, r"r: 10 is not a multiple of block_size=4"),
    ],
)
def test_ranks_that_do_not_fit(fields: dict[str, int], complaint: str, untouched: Callable[[nn.Module], Any]) -> None:
    """The misfit is named with the layer and the values that would be right; without a rotation r need not be a multiple."""
    model = one_layer(24, 12, bias=False)
    with untouched(model), pytest.raises(ll.MisfitError, match=rf"0 \(24 -> 12\): antipasto: {complaint}"):
        ll.attach(model, "antipasto", targets="0", **fields)
    assert ll.plan(model, "antipasto", targets="0", r=10, rotate_basis="none").parameters == 10


@pytest.mark.parametrize(
    "field", [{"rotate_basis": "W"}, {"block_size": 1}, {"max_angle": math.pi}, {"max_angle": 0.0}, {"select": "best"}]
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'antipasto': {name}={value!r}: "):
        ll.plan(one_layer(24, 12, bias=False), "antipasto", targets="0", **field)
