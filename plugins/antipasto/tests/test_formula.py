"""Every variant of the family, on every basis, is its explicit weight; and its bounds hold."""

from __future__ import annotations

import math
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_antipasto import AntiPaSTO, AntiPaSTOAblate, AntiPaSTOGain, AntiPaSTOMix
from torch import Tensor, nn

ARMS = ("V", "U", "both", "none")
BASES = ("plain", "asvd", "rms", "corda", "corda_sqrt")
SHAPES = [(24, 12), (12, 24), (16, 16)]
SCALES = st.sampled_from([1.0, -1.0, 0.37, 2.5])

bases = st.sampled_from(BASES)
selections = st.sampled_from(["top", "activation"])
variants = st.one_of(
    st.builds(
        AntiPaSTO,
        r=st.just(8),
        basis=bases,
        select=selections,
        rotate_basis=st.sampled_from(ARMS),
        block_size=st.sampled_from([2, 4, 8]),
        max_angle=st.floats(0.1, 3.0),
    ),
    st.builds(
        AntiPaSTOGain,
        r=st.sampled_from([3, 8]),
        basis=bases,
        select=selections,
        mode=st.sampled_from(["bounded", "additive"]),
    ),
    st.builds(
        AntiPaSTOAblate,
        r=st.sampled_from([5, 8]),
        basis=bases,
        select=selections,
        k=st.integers(1, 5),
    ),
    st.builds(
        AntiPaSTOMix,
        r=st.sampled_from([5, 8]),
        basis=bases,
        select=selections,
        k=st.integers(1, 5),
        gain=st.booleans(),
    ),
)


def one_layer(d_in: int, d_out: int, bias: bool = True) -> nn.Sequential:
    """A model in float64 that is one linear layer with fixed weights and a large bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64))
    if bias:
        nn.init.normal_(model[0].bias, std=3)
    return model


def data(d_in: int) -> Tensor:
    """300 correlated rows of very different spreads, around a mean that is not 0."""
    rng = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=rng, dtype=torch.float64)).Q
    rows = torch.randn(300, d_in, generator=rng, dtype=torch.float64)
    return 7 * (rows * torch.linspace(0.3, 3, d_in, dtype=torch.float64)) @ turn + torch.randn(
        d_in, generator=rng
    )


def attached(model: nn.Module, variant: Any) -> ll.Adapter:
    """At the layer, in float64, with data where the variant needs them."""
    calibrated = variant.basis != "plain" or variant.select == "activation"
    batches = data(model[0].in_features).split(70) if calibrated else None
    return ll.attach(model, variant, targets="0", dtype=torch.float64, calibration=batches)


def randomize(adapter: ll.Adapter, size: float = 0.3) -> dict[str, Tensor]:
    """Give every trainable tensor random values, and return them by tensor name."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in adapter.named_parameters():
            p.copy_(size * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return {name.rpartition(".")[2]: p.detach() for name, p in adapter.named_parameters()}


def orientation(basis: str, x: Tensor) -> Tensor:
    """M as a dense matrix, from all rows x at once."""
    x = x / x.square().mean().sqrt()
    c = x.T @ x / len(x)
    if basis == "plain":
        return torch.eye(len(c), dtype=torch.float64)
    if basis == "asvd":
        return torch.diag(x.abs().mean(0) ** 0.5)
    if basis == "rms":
        return torch.diag(x.square().mean(0) ** 0.5)
    return (
        c if basis == "corda" else torch.linalg.cholesky(c)
    )  # any root of C gives the same U, S and P


def factors(w: Tensor, x: Tensor, variant: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, P by the definition, with an inverse, and with the signs of the columns of `like`."""
    m = orientation(variant.basis, x)
    u, s, q = torch.linalg.svd(w @ m, full_matrices=False)
    kept = torch.arange(variant.r)
    if variant.select == "activation":
        kept = (x @ w.T @ u).std(0).topk(variant.r).indices.sort().values
    p = q @ torch.linalg.inv(m)
    u, s, p = u[:, kept], s[kept], p[kept]
    signs = (u * like).sum(0).sign()
    torch.testing.assert_close(u * signs, like, rtol=0, atol=1e-9)
    return u * signs, s, signs[:, None] * p


def rotation(theta: Tensor, block: int, max_angle: float, scale: float) -> Tensor:
    """R as one dense matrix, (I - X)⁻¹ (I + X), plane by plane."""
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


def bounded(g: Tensor) -> Tensor:
    """The factor of a bounded gain."""
    return torch.tensor([math.exp(v) if v <= 0 else 1 + v for v in g.tolist()], dtype=torch.float64)


def orthonormal(c: Tensor) -> Tensor:
    """The columns of C, one after the other made orthogonal to those before and of length 1."""
    columns: list[Tensor] = []
    for column in c.T:
        for earlier in columns:
            column = column - earlier * (earlier @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


def adapted_core(variant: Any, s: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    """What stands in place of diag(S)."""
    if isinstance(variant, AntiPaSTO):
        eye = torch.eye(variant.r, dtype=torch.float64)
        r_u, r_v = (
            rotation(t[name], variant.block_size, variant.max_angle, scale) if name in t else eye
            for name in ("theta_U", "theta_V")
        )
        return r_u.T @ torch.diag(s + scale * t["delta"]) @ r_v
    if isinstance(variant, AntiPaSTOGain):
        return torch.diag(
            s * bounded(scale * t["g"]) if variant.mode == "bounded" else s + scale * t["delta"]
        )
    if isinstance(variant, AntiPaSTOAblate):
        c = orthonormal(t["C"])
        return torch.diag(s) - scale * c @ torch.diag(t["alpha"]) @ c.T @ torch.diag(s)
    gain = bounded(scale * t["g"]) if variant.gain else torch.ones_like(s)
    return torch.diag(s * gain) + scale * t["B"] @ t["A"]


@given(variant=variants, shape=st.sampled_from(SHAPES), bias=st.booleans(), scale=SCALES)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_every_variant_is_its_explicit_weight(
    variant: Any, shape: tuple[int, int], bias: bool, scale: float
) -> None:
    """y' = W' x + b with W' = U (core) P + W_res, dense and in float64."""
    model = one_layer(*shape, bias)
    adapter = attached(model, variant)
    t = randomize(adapter)
    adapter.scale = scale
    w = model[0].weight.detach()
    u, s, p = factors(w, data(shape[0]), variant, adapter.state_dict()["0.U"])
    adapted = u @ adapted_core(variant, s, t, scale) @ p + (w - u @ torch.diag(s) @ p)
    x = torch.randn(7, shape[0], dtype=torch.float64)
    expected = x @ adapted.T + (model[0].bias if bias else 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, x @ w.T + (model[0].bias if bias else 0), atol=1e-3)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_minus_scale_undoes_the_rotation(arm: Any, shape: tuple[int, int], basis: Any) -> None:
    """R(-c) = R(c)⁻¹: with δ = 0 the cores at c and -c, S taken off, are inverse to each other."""
    model = one_layer(*shape, bias=False)
    variant = AntiPaSTO(r=8, rotate_basis=arm, basis=basis)
    adapter = attached(model, variant)
    t = randomize(adapter)
    for name, p in adapter.named_parameters():
        if name.endswith("delta"):
            nn.init.zeros_(p)
    w = model[0].weight.detach()
    u, s, p = factors(w, data(shape[0]), variant, adapter.state_dict()["0.U"])
    cores = []
    for scale in (0.8, -0.8):
        adapter.scale = scale
        adapted = model(torch.eye(shape[0], dtype=torch.float64)).T.detach()
        cores.append(u.T @ adapted @ torch.linalg.pinv(p))  # R_uᵀ S R_v
    if (
        arm == "both"
    ):  # the two rotations do not commute with S: compare with the rotations themselves
        r_u, r_v = (rotation(t[n], 4, variant.max_angle, 0.8) for n in ("theta_U", "theta_V"))
        torch.testing.assert_close(cores[0], r_u.T @ torch.diag(s) @ r_v)
        torch.testing.assert_close(cores[1], r_u @ torch.diag(s) @ r_v.T)
        return
    forth, back = (core / s[:, None] if arm == "V" else core / s for core in cores)
    torch.testing.assert_close(
        forth @ back, torch.eye(8, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    assert arm == "none" or not torch.allclose(forth, torch.eye(8, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize(
    "variant",
    [
        AntiPaSTO(r=8, rotate_basis="none"),
        AntiPaSTOGain(r=8, mode="additive"),
        AntiPaSTOAblate(r=8, k=3),
        AntiPaSTOMix(r=8, k=3, gain=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_linear_cores_are_linear_in_the_scale(variant: Any, shape: tuple[int, int]) -> None:
    """Without a rotation and a bounded gain, scale -c gives minus the change of scale c."""
    model, x = one_layer(*shape), torch.randn(5, shape[0], dtype=torch.float64)
    base = model(x)
    adapter = attached(model, variant)
    randomize(adapter)
    change = {}
    for scale in (1.0, 2.5, -2.5):
        adapter.scale = scale
        change[scale] = (model(x) - base).detach()
    torch.testing.assert_close(change[2.5], 2.5 * change[1.0])
    torch.testing.assert_close(change[-2.5], -2.5 * change[1.0])


def gains(model: nn.Module, adapter: ll.Adapter) -> Tensor:
    """S' / S of every direction, read off the adapted weight."""
    u, w = adapter.state_dict()["0.U"], model[0].weight.detach()
    adapted = (model(torch.eye(w.shape[1], dtype=torch.float64)) - model[0].bias).T.detach()
    before, after = u.T @ w, u.T @ adapted
    return (before * after).sum(1) / before.square().sum(1)


@given(
    basis=bases,
    shape=st.sampled_from(SHAPES),
    scale=st.floats(-3, 3),
    size=st.sampled_from([0.1, 1.0, 10.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_bounded_gain_never_flips_a_direction(
    basis: Any, shape: tuple[int, int], scale: float, size: float
) -> None:
    """Whatever g and the scale are, every direction keeps its sign."""
    model = one_layer(*shape)
    adapter = attached(model, AntiPaSTOGain(r=8, basis=basis))
    randomize(adapter, size)
    adapter.scale = scale
    assert (gains(model, adapter) > -1e-9).all()


@pytest.mark.parametrize("mode", ["bounded", "additive"])
@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_suppress_only_holds_after_every_step(mode: Any, shape: tuple[int, int]) -> None:
    """A loss that wants the output larger leaves every gain at 1.

    One that wants it smaller then still turns them down, and an additive one not past 0. Without
    suppress_only the first loss raises them, the second takes an additive one past 0.
    """
    raised = {}
    for suppress_only in (False, True):
        model = one_layer(*shape)
        adapter = attached(model, AntiPaSTOGain(r=8, mode=mode, suppress_only=suppress_only))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.2)
        adapter.project_after(optimizer)
        x = torch.randn(32, shape[0], dtype=torch.float64)
        base = (model(x) - model[0].bias).detach()
        for sign, steps in ((-1, 20), (1, 100)):
            for _ in range(steps):
                optimizer.zero_grad()
                (sign * (base * model(x)).sum(1).mean()).backward()
                optimizer.step()
                found = gains(model, adapter)
                assert not suppress_only or (found <= 1 + 1e-9).all()
                assert not suppress_only or (found >= -1e-9).all()
            raised[suppress_only, sign] = found
    assert (raised[False, -1] > 1.01).any()
    torch.testing.assert_close(raised[True, -1], torch.ones(8, dtype=torch.float64))
    assert (raised[True, 1] < 0.99).all()
    assert mode == "bounded" or (raised[False, 1] < 0).any()


@given(
    basis=bases,
    shape=st.sampled_from(SHAPES),
    k=st.integers(1, 8),
    scale=st.floats(0, 1),
    size=st.sampled_from([0.3, 3.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ablation_never_lengthens_an_output(
    basis: Any, shape: tuple[int, int], k: int, scale: float, size: float
) -> None:
    """‖y - b + Δ‖ ≤ ‖y - b‖ for every input, once projected; at a negative scale it is longer."""
    model, x = one_layer(*shape), torch.randn(50, shape[0], dtype=torch.float64)
    base = (model(x) - model[0].bias).norm(dim=1)
    adapter = attached(model, AntiPaSTOAblate(r=8, k=k, basis=basis))
    randomize(adapter, size)
    adapter.project()
    alpha = next(p for name, p in adapter.named_parameters() if name.endswith("alpha"))
    assert ((alpha >= 0) & (alpha <= 1)).all()
    for sign in (1, -1):
        adapter.scale = sign * scale
        change = (model(x) - model[0].bias).norm(dim=1) - base
        assert (sign * change <= 1e-9).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_ablation_holds_alpha_after_every_step(sign: int) -> None:
    """α stays in [0, 1] whatever the loss wants, reaches the end, and comes back from it."""
    model = one_layer(24, 12)
    adapter = attached(model, AntiPaSTOAblate(r=8, k=2, init_alpha=0.5))
    alpha = next(p for name, p in adapter.named_parameters() if name.endswith("alpha"))
    optimizer = torch.optim.SGD([alpha], lr=3.0)
    adapter.project_after(optimizer)
    x = torch.randn(32, 24, dtype=torch.float64)
    with adapter.disabled():
        base = (model(x) - model[0].bias).detach()
    ends = []
    for direction in (sign, -sign):
        for _ in range(20):
            optimizer.zero_grad()
            (direction * (base * model(x)).mean()).backward()  # removing makes it smaller
            optimizer.step()
            assert ((alpha >= 0) & (alpha <= 1)).all()
        ends.append(alpha.detach().clone())
    assert (ends[0] == (1 if sign == 1 else 0)).all()
    assert (ends[1] == 1 - ends[0]).all()


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_ablation_starts_by_removing_init_alpha(shape: tuple[int, int]) -> None:
    """At the start every direction of O is removed by init_alpha; at scale 0 none is."""
    model, x = one_layer(*shape), torch.randn(9, shape[0], dtype=torch.float64)
    base = model(x)
    adapter = ll.attach(
        model, AntiPaSTOAblate(r=8, k=3, init_alpha=0.3), targets="0", dtype=torch.float64
    )
    state = adapter.state_dict()
    o = state["0.U"] @ orthonormal(state["0.C"])
    plain = base - model[0].bias
    torch.testing.assert_close((model(x) - model[0].bias) @ o, 0.7 * plain @ o)
    adapter.scale = 0.0
    assert torch.equal(model(x), base)
    assert adapter.variant.identity == "none"
