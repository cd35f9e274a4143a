"""In half precision Δ is as precise as LoRA's up to a factor of 2, whatever weight and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_antipasto import AntiPaSTO, AntiPaSTOAblate, AntiPaSTOGain, AntiPaSTOMix
from torch import Tensor, nn
from torch.nn.functional import linear

HALF = [torch.bfloat16, torch.float16]
SHAPES = [(64, 64, 64), (128, 64, 32), (64, 128, 64)]
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda share: torch.ones_like(share),
    "1 to 1e-2": lambda share: 1e-2**share,
    "1 to 1e-4": lambda share: 1e-4**share,
    "50 to 0.05": lambda share: 50 * 1e-3**share,
    "a cliff": lambda share: torch.where(share < 0.3, 1.0, 1e-3),
}


def family(r: int, **fields: Any) -> dict[str, Any]:
    """Every arm of every method."""
    return {
        **{arm: AntiPaSTO(r=r, rotate_basis=arm, **fields) for arm in ("V", "U", "both", "none")},
        "bounded gain": AntiPaSTOGain(r=r, **fields),
        "additive gain": AntiPaSTOGain(r=r, mode="additive", **fields),
        "ablation": AntiPaSTOAblate(r=r, k=4, init_alpha=0.5, **fields),
        "mixing": AntiPaSTOMix(r=r, k=4, **fields),
        "mixing without a gain": AntiPaSTOMix(r=r, k=4, gain=False, **fields),
    }


ARMS = tuple(family(8))


def layer_of(spectrum: str, d_in: int, d_out: int, bias: float = 0.0) -> nn.Linear:
    """Random singular vectors and the given singular values; a bias of the given size, if any."""
    rng = torch.Generator().manual_seed(0)
    n = min(d_in, d_out)
    u, v = (torch.linalg.qr(torch.randn(d, n, generator=rng)).Q for d in (d_out, d_in))
    layer = nn.Linear(d_in, d_out, bias=bias > 0)
    with torch.no_grad():
        layer.weight.copy_(u * SPECTRA[spectrum](torch.linspace(0, 1, n)) @ v.T)
        if bias:
            layer.bias.copy_(bias * torch.randn(d_out, generator=rng))
    return layer


def rows(d_in: int, smallest: float = 1.0) -> Tensor:
    """1,000 rows whose spreads in random directions go from 1 to `smallest`: correlated inputs."""
    rng = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=rng)).Q
    return torch.randn(1000, d_in, generator=rng) * smallest ** torch.linspace(0, 1, d_in) @ turn


def stored(adapter: ll.Adapter) -> dict[str, Tensor]:
    """The tensors of the only layer, as the adapter keeps them."""
    return {key.rpartition(".")[2]: value for key, value in adapter.state_dict().items()}


def change(variant: Any, model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Δ alone, in x's dtype: y' - y would have the rounding of y' in it."""
    placement = ll.plan(model, variant, targets="0").placements[0]
    at_least_float32 = torch.promote_types(x.dtype, torch.float32)
    dtypes = {"activation": x.dtype, "float32": at_least_float32}
    t = {name: tensors[name].to(dtypes[spec.compute]) for name, spec in placement.specs.items()}
    with torch.no_grad():
        y = model(x)
        prepared = variant.prepare(placement.site, t)
        delta: Tensor = variant.delta_output(placement.site, {**t, **prepared}, x, y)
    assert delta.dtype == x.dtype
    return delta.double()


def error(variant: Any, layer: nn.Module, x: Tensor, data: Tensor | None = None) -> float:
    """Of Δ in x's dtype, relative to Δ in float64 of the same numbers before they are rounded."""
    model = nn.Sequential(layer)
    w = ll.plan(model, variant, targets="0").placements[0].site.weight()
    precise = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=layer.bias is not None)).double()
    with torch.no_grad():
        precise[0].weight.copy_(w)
        if layer.bias is not None:
            precise[0].bias.copy_(layer.bias)
    rng = torch.Generator().manual_seed(5)
    kept = []
    for one, dtype in ((precise, torch.float64), (model, x.dtype)):
        calibration = None if data is None else [data.to(dtype)]
        adapter = ll.attach(
            one,
            variant,
            targets="0",
            calibration=calibration,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        kept.append(stored(adapter))
        trained = {name.rpartition(".")[2] for name, _ in adapter.named_parameters()}
        adapter.detach()
    exact, rounded = kept
    for name in trained - {"C", "alpha"}:  # these start at other values than 0
        exact[name] = 0.05 * torch.randn(exact[name].shape, generator=rng, dtype=torch.float64)
    same = {name: exact[name].to(value.dtype) for name, value in rounded.items()}
    expected = change(variant, precise, exact, x.double())
    return float((change(variant, model, same, x) - expected).norm() / expected.norm())


def error_of_lora(x: Tensor, d_out: int) -> float:
    """The same of B (A x), the plainest Δ there is, of rank 8."""
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(8, x.shape[1], generator=rng), torch.randn(d_out, 8, generator=rng)
    exact = linear(linear(x.double(), a.double()), b.double())
    rounded = linear(linear(x, a.to(x.dtype)), b.to(x.dtype)).double()
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_change_is_as_precise_as_loras(arm: str, spectrum: str, dtype: torch.dtype) -> None:
    """Whatever the spectrum, the shape, the rank and the bias: y's rounding has no part in it."""
    for d_in, d_out, r in SHAPES:
        x = rows(d_in)[:64].to(dtype)
        for bias in (0.0, 3.0):
            layer = layer_of(spectrum, d_in, d_out, bias).to(dtype)
            assert error(family(r)[arm], layer, x) <= 2 * error_of_lora(x, d_out)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("basis", ["asvd", "rms", "corda", "corda_sqrt"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_basis_from_correlated_data_loses_nothing(
    arm: str, basis: str, dtype: torch.dtype
) -> None:
    """On inputs whose spreads differ by 100 V has large entries that cancel; it is kept precise."""
    for d_in, d_out, r in SHAPES:
        data = rows(d_in, smallest=1e-2)
        x = data[:64].to(dtype)
        layer = layer_of("1 to 1e-2", d_in, d_out).to(dtype)
        variant = family(r, basis=basis)[arm]
        assert error(variant, layer, x, data) <= 2 * error_of_lora(x, d_out)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_8_bit_layer_in_eval_mode_counts_as_half_precision(arm: str, dtype: torch.dtype) -> None:
    """There the base rounds x to 8 bits, and y with it; Δ does not come from either."""
    pytest.importorskip("lora_lite_bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    for spectrum in ("flat", "1 to 1e-4"):
        layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": layer_of(spectrum, 64, 64).weight.detach()})
        x = rows(64)[:64].to(dtype)
        variant = family(64)[arm]
        assert error(variant, layer.to("cpu").eval(), x) <= 2 * error_of_lora(x, 64)


@pytest.mark.parametrize("arm", ARMS)
def test_half_precision_and_a_tiny_singular_value_are_finite(arm: str) -> None:
    """float16 has no 1 / S for S = 2.5e-6: nothing computes one."""
    model = nn.Sequential(nn.Linear(64, 64)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.logspace(0, -5.6, 64)))
    adapter = ll.attach(model, family(64)[arm], targets="0")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    y = model(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).half())
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("variant", ["antipasto", "antipasto_gain", "antipasto_mix"])
def test_a_file_of_the_first_format_says_what_to_do(variant: str) -> None:
    """It has no V, and an upgrade has no weight to compute it from: an error, not a wrong model."""
    cls = type(
        family(8)[{"antipasto": "V", "antipasto_gain": "bounded gain"}.get(variant, "mixing")]
    )
    with pytest.raises(
        ll.AdapterFileError, match=r"in format 1, without .* Attach the method again"
    ):
        cls.upgrade({"r": 8}, {"U": torch.ones(4, 8), "S": torch.ones(8)}, 1)
