"""How the AntiPaSTO family finds its basis from calibration data, in bounded memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_antipasto import AntiPaSTO, AntiPaSTOGain
from lora_lite_antipasto.calibration import Moments
from torch import Tensor, nn

ORIENTED = ("asvd", "rms", "corda", "corda_sqrt")
FAMILY = ("antipasto", "antipasto_gain", "antipasto_ablate", "antipasto_mix")
FEW: dict[str, dict[str, int]] = {"antipasto_mix": {"k": 2}}  # where a default does not fit r = 4
SHAPES = [(24, 12), (12, 24)]


def one_layer(d_in: int, d_out: int, bias: bool = True) -> nn.Sequential:
    """A model that is one linear layer with fixed weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, d_out, bias=bias))


def randomize(adapter: ll.Adapter) -> None:
    """Give every trainable tensor random values."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))


def same_span(kept: Tensor, expected: Tensor) -> None:
    """Column by column, up to sign."""
    torch.testing.assert_close(
        (kept * expected).sum(0).abs(), torch.ones_like(kept[0]), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_picks_the_directions_with_the_largest_output_variance(
    shape: tuple[int, int],
) -> None:
    """select="activation" keeps the r coordinates of Uᵀ y with the largest variance."""
    model = one_layer(*shape)
    w = model[0].weight.detach()
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    batches = [
        (torch.randn(2, 9, len(v)) * torch.linspace(0.1, 9, len(v))) @ v + 2 for _ in range(5)
    ]
    y = torch.cat(batches).reshape(-1, shape[0]) @ w.T
    expected = (y @ u).var(0).topk(4).indices.sort().values
    assert expected.tolist() != [0, 1, 2, 3]  # else "top" would pass too
    adapter = ll.attach(
        model, AntiPaSTO(r=4, select="activation"), targets="0", calibration=batches
    )
    same_span(adapter.state_dict()["0.U"], u[:, expected])


def test_statistics_survive_a_large_mean() -> None:
    """Features far from 0, as language models have them, do not drown the variances."""
    model = one_layer(12, 24, bias=False)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 12, generator=rng) * torch.linspace(0.05, 1, 12)
    offset = 10_000 * torch.randn(12, generator=rng)
    u, _, _ = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    exact = (
        (x.double() @ model[0].weight.detach().double().T @ u).var(0).topk(4).indices.sort().values
    )
    adapter = ll.attach(
        model,
        AntiPaSTO(r=4, select="activation"),
        targets="0",
        calibration=list((x + offset).split(100)),
    )
    same_span(adapter.state_dict()["0.U"].double(), u[:, exact])


@pytest.mark.parametrize("shape", SHAPES)
def test_corda_sqrt_is_the_principal_directions_of_the_output(shape: tuple[int, int]) -> None:
    """U and S² are the leading eigenpairs of E[(y - b) (y - b)ᵀ], x having mean square 1."""
    model = one_layer(*shape)
    x = torch.randn(500, shape[0]) @ torch.randn(shape[0], shape[0])
    y = (model(x) - model[0].bias).detach().double() / x.double().square().mean().sqrt()
    values, vectors = torch.linalg.eigh(y.T @ y / len(y))
    adapter = ll.attach(model, AntiPaSTO(r=4, basis="corda_sqrt"), targets="0", calibration=[x])
    state = adapter.state_dict()
    same_span(state["0.U"].double(), vectors.flip(1)[:, :4])
    torch.testing.assert_close(state["0.S"].double() ** 2, values.flip(0)[:4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("basis", ORIENTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_the_data_changes_nothing(basis: Any, shape: tuple[int, int]) -> None:
    """Data times 1000 give the same basis and S, which on white data is that of the plain basis."""
    x = torch.randn(400, shape[0]) * torch.linspace(0.5, 2, shape[0])
    states = []
    for size in (1.0, 1000.0):
        adapter = ll.attach(
            one_layer(*shape), AntiPaSTO(r=4, basis=basis), targets="0", calibration=[size * x]
        )
        states.append(adapter.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-4)
    white = torch.randn(100_000, shape[0])
    model = one_layer(*shape)
    s = ll.attach(
        model, AntiPaSTO(r=4, basis=basis), targets="0", calibration=[white]
    ).state_dict()["0.S"]
    expected = torch.linalg.svdvals(model[0].weight.detach())[:4]
    factor = (2 / torch.pi) ** 0.25 if basis == "asvd" else 1.0  # the square root of E|x|
    torch.testing.assert_close(s, factor * expected, rtol=3e-2, atol=0)


@pytest.mark.parametrize("basis", ORIENTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_and_order_do_not_count(basis: Any, shape: tuple[int, int]) -> None:
    """The averages are over tokens that the mask keeps, whatever the batches they come in."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = one_layer(*shape)[0]

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    x = torch.randn(6, 10, shape[0]) * torch.linspace(0.5, 2, shape[0])
    mask = torch.ones(6, 10)
    mask[:, 7:] = 0
    padded = [{"x": x[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    padded[0]["x"] = x[:2].clone()
    padded[0]["x"][:, 7:] = 100
    kept = [{"x": x[:, :7].reshape(-1, shape[0])[torch.randperm(42)]}]
    states = [
        ll.attach(
            Masked(), AntiPaSTOGain(r=4, basis=basis), targets="layer", calibration=batches
        ).state_dict()
        for batches in (padded, kept)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis", ["plain", *ORIENTED])
@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
def test_memory_does_not_grow_with_the_number_of_batches(
    basis: Any, shape: tuple[int, int]
) -> None:
    """What an observer holds is the same after 1 batch as after 50.

    No more than the weight and a square of its shorter side, in float64, beside vectors.
    """
    placement = ll.plan(
        one_layer(*shape), AntiPaSTO(r=4, basis=basis, select="activation"), targets="0"
    ).placements[0]
    held = []
    for batches in (1, 50):
        observer = placement.variant.observe(placement.site)
        assert isinstance(observer, Moments)
        for _ in range(batches):
            observer.update(torch.randn(32, shape[0]), torch.randn(32, shape[1]))
        held.append(len(pickle.dumps(observer)))
    assert held[0] == pytest.approx(held[1], abs=8)  # the number of rows is a longer one
    weight = 60 * 200 if basis == "corda" else 0
    assert held[0] <= 8 * (weight + 60 * 60 + 4 * 200) + 4000


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("basis", ORIENTED)
def test_a_calibrated_basis_loads_without_data_and_refuses_a_slim_file(
    variant: str, basis: str, tmp_path: Path
) -> None:
    """What calibration data chose is in the file, which cannot be slim; loading needs no data."""
    model = one_layer(24, 12)
    adapter = ll.attach(
        model,
        variant,
        r=4,
        basis=basis,
        targets="0",
        calibration=[torch.randn(50, 24)],
        **FEW.get(variant, {}),
    )
    randomize(adapter)
    x = torch.randn(3, 24)
    with pytest.raises(ll.AdapterFileError, match=rf"derived=False.*{basis}"):
        adapter.save(tmp_path / "slim.safetensors", derived=False)
    assert not list(tmp_path.iterdir())
    adapter.save(tmp_path / "full.safetensors")
    fresh = one_layer(24, 12)
    ll.load(fresh, tmp_path / "full.safetensors")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("basis", ORIENTED)
def test_missing_data_are_asked_for(
    variant: str, basis: str, untouched: Callable[[nn.Module], Any]
) -> None:
    """Without calibration= the error says what to give; so it does with data nobody needs."""
    model = one_layer(24, 12)
    fields = {"r": 4, "targets": "0", **FEW.get(variant, {})}
    with (
        untouched(model),
        pytest.raises(
            ll.CalibrationError, match=rf"{variant}\(.*basis='{basis}'.* needs calibration data"
        ),
    ):
        ll.attach(model, variant, basis=basis, **fields)
    with (
        untouched(model),
        pytest.raises(
            ll.CalibrationError, match=rf"{variant} needs no calibration data with these fields"
        ),
    ):
        ll.attach(model, variant, calibration=[torch.randn(50, 24)], **fields)


@pytest.mark.parametrize(
    ("fields", "rows", "complaint"),
    [
        (
            {"select": "activation"},
            torch.randn(3, 24),
            r"0: select='activation' chooses r=4 directions and saw 3 .*Give at least",
        ),
        *(
            (
                {"basis": b},
                torch.randn(3, 24),
                rf"0: basis='{b}' chooses r=4 directions and saw 3 .*tokens",
            )
            for b in ORIENTED
        ),
        *(
            (
                {"basis": b},
                torch.zeros(9, 24),
                rf"0: basis='{b}' chooses r=4 .* 9 .* span only 0. Give other",
            )
            for b in ORIENTED
        ),
        (
            {"basis": "corda"},
            torch.randn(1, 24).expand(9, 24),
            r"0: basis='corda' chooses r=4 .* 9 .* span only 1. Give other",
        ),
        (
            {"basis": "corda_sqrt"},
            torch.randn(1, 24).expand(9, 24),
            r"0: basis='corda_sqrt' .* span only 1. Give other",
        ),
        (
            {"basis": "rms"},
            torch.full((9, 24), torch.inf),
            r"0: basis='rms' averages .* not all finite",
        ),
        (
            {"select": "activation"},
            torch.full((9, 24), torch.nan),
            r"0: select='activation' averages .* not all finite",
        ),
    ],
)
@pytest.mark.parametrize("shape", [(24, 12), (24, 30)])
def test_data_that_cannot_choose_are_refused(
    fields: Any,
    rows: Tensor,
    complaint: str,
    shape: tuple[int, int],
    untouched: Callable[[nn.Module], Any],
) -> None:
    """Too few tokens, or tokens that span too little or are not finite: named with the site."""
    model = one_layer(*shape)
    with untouched(model), pytest.raises(ll.CalibrationError, match=complaint):
        ll.attach(model, "antipasto", r=4, targets="0", calibration=[rows], **fields)


def test_a_basis_needs_no_more_tokens_than_directions() -> None:
    """Nothing is inverted: as many tokens as directions are enough, far fewer than d_in."""
    for basis in ORIENTED:
        model = one_layer(24, 12)
        adapter = ll.attach(
            model, AntiPaSTO(r=8, basis=basis), targets="0", calibration=[torch.randn(8, 24)]
        )
        randomize(adapter)
        assert model(torch.randn(5, 24)).isfinite().all()
