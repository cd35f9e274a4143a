"""The shared top-r SVD, the start of LoRA's form, the types of fields, the probes of a base."""

from __future__ import annotations

import math
from collections.abc import Callable

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite.author import (
    DropoutRate,
    Finite,
    NonNegativeFinite,
    PositiveFinite,
    lora_scale,
    row_signs,
    top_r_svd,
    uniform_start,
)
from lora_lite.fingerprint import probe, probe_agrees
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

# The i-th singular value as a function of i = 1, 2, ..., 300: from fast to flat.
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "i^-1": lambda i: i**-1,
    "i^-1/2": lambda i: i**-0.5,
    "i^-1/4": lambda i: i**-0.25,
    "i^-1/10": lambda i: i**-0.1,
    "1 to 1e-4": lambda i: 10 ** (-4 * i / 300),
}
SHAPES = [(512, 300), (300, 512)]


def of_spectrum(name: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of random singular vectors and the given singular values."""
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=rng, dtype=dtype)).Q for n in shape)
    s = SPECTRA[name](torch.arange(1, 301, dtype=dtype))
    return u @ torch.diag(s) @ v.T


def smallest_cosine(one: Tensor, other: Tensor) -> float:
    """Of the largest angle between two spaces, given by orthonormal rows."""
    return float(torch.linalg.svdvals(one.double() @ other.double().T).min())


@given(
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    method=st.sampled_from(["exact", "randomized"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_r_svd_of_small_matrices(
    d_out: int, d_in: int, share: float, seed: int, method: str
) -> None:
    """Orthonormal U and V, descending S, and U S V is the best approximation of rank r."""
    w = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = 1 + round(share * (min(w.shape) - 1))
    u, s, v = top_r_svd(w, r, method)  # type: ignore[arg-type]
    identity = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity)
    torch.testing.assert_close(v @ v.T, identity)
    exact = torch.linalg.svdvals(w)
    torch.testing.assert_close(s, exact[:r])
    torch.testing.assert_close(
        (w - u @ torch.diag(s) @ v).norm(), exact[r:].norm(), rtol=1e-6, atol=1e-9
    )
    assert (row_signs(v) > 0).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 8, 32])
def test_the_randomized_space_is_the_exact_one(
    spectrum: str, shape: tuple[int, int], r: int
) -> None:
    """However slowly the spectrum falls off, the worst of r directions has a cosine ≥ 0.9999."""
    w = of_spectrum(spectrum, shape)
    fast, again = top_r_svd(w, r), top_r_svd(w, r)
    u, s, v = top_r_svd(w.double(), r, "exact")
    assert smallest_cosine(fast[0].T, u.T) >= 0.9999
    assert smallest_cosine(fast[2], v) >= 0.9999
    torch.testing.assert_close(fast[1].double(), s, rtol=1e-3, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_noise_is_decomposed_in_full(shape: tuple[int, int]) -> None:
    """The spectrum of a Gaussian matrix is nearly flat; the directions are right all the same."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = top_r_svd(w, 16)
    exact_u, _, exact_v = top_r_svd(w.double(), 16, "exact")
    assert smallest_cosine(u.T, exact_u.T) >= 0.9999
    assert smallest_cosine(v, exact_v) >= 0.9999


@pytest.mark.parametrize("spectrum", ["i^-1/2", "i^-1/10"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_direction_is_the_exact_one_with_its_sign(
    spectrum: str, shape: tuple[int, int]
) -> None:
    """Each of 8 directions has a cosine ≥ 0.999 with the exact one, and its sign."""
    w = of_spectrum(spectrum, shape)
    exact, fast = top_r_svd(w.double(), 8, "exact"), top_r_svd(w, 8)
    for one, other in ((exact[0].T, fast[0].T), (exact[2], fast[2])):
        assert float((one * other).sum(1).min()) >= 0.999


@pytest.mark.parametrize("spectrum", ["i^-1/2", "i^-1/10"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_the_left_side_gives_the_right_one(
    spectrum: str, shape: tuple[int, int], method: str
) -> None:
    """Uᵀ W / S has orthonormal rows up to 1e-5, on tall and on wide matrices, and is V."""
    w = of_spectrum(spectrum, shape)
    u, s, v = top_r_svd(w, 16, method)  # type: ignore[arg-type]
    rows = (u.T @ w) / s[:, None]
    torch.testing.assert_close(rows, v, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("exponent", [-66, -30, 0, 30, 66])
@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_the_size_of_the_matrix_costs_no_digit(exponent: int, method: str) -> None:
    """A W times a power of two has the same U and V to the bit, and S times that power."""
    w = of_spectrum("i^-1/2", (300, 512))
    u, s, v = top_r_svd(w, 8, method)  # type: ignore[arg-type]
    scaled = top_r_svd(w * 2.0**exponent, 8, method)  # type: ignore[arg-type]
    assert torch.equal(scaled[0], u)
    assert torch.equal(scaled[1], s * 2.0**exponent)
    assert torch.equal(scaled[2], v)


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (12, 20)])
@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_a_matrix_of_low_rank_has_orthonormal_vectors(
    rank: int, shape: tuple[int, int], method: str
) -> None:
    """Where S is 0 the vectors are still orthonormal and finite; of zeros, unit vectors."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(shape[0], rank, generator=rng) @ torch.randn(rank, shape[1], generator=rng)
    u, s, v = top_r_svd(w, 8, method)  # type: ignore[arg-type]
    torch.testing.assert_close(u.T @ u, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.T, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(u @ torch.diag(s) @ v, w, rtol=0, atol=1e-4)
    assert float(s[rank:].max()) <= 1e-4
    if rank == 0:
        assert torch.equal(u, torch.eye(shape[0])[:, :8])
        assert torch.equal(v, torch.eye(shape[1])[:8])


@given(seed=st.integers(0, 99), size=st.sampled_from([1e-6, 1e-5]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rounding_does_not_choose_a_sign(seed: int, size: float) -> None:
    """Rows of which several entries are equally large keep their sign under noise of rounding."""
    rows = torch.tensor([[0.5, -0.5, 0.5, -0.5], [-0.5, -0.5, 0.5, 0.5], [0.1, 0.7, -0.7, 0.0]])
    noise = size * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    assert row_signs(rows + noise).flatten().tolist() == [1, -1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_refused_with_the_layers_name(value: float) -> None:
    """A NaN or an infinity in W is an error that names the layer; not LAPACK's."""
    w = torch.ones(8, 12)
    w[3, 4] = value
    with pytest.raises(ll.AdapterError, match=r"weight of blocks\.0\.up has entries that are") as e:
        top_r_svd(w, 2, layer="blocks.0.up")
    assert e.value.layer == "blocks.0.up"


@pytest.mark.parametrize("r", [0, -1, 9])
def test_an_impossible_rank_is_refused(r: int) -> None:
    """r outside of 1 … min(d_in, d_out) is an error that says what is possible."""
    with pytest.raises(ll.FieldError, match=r"between 1 and 8"):
        top_r_svd(torch.ones(8, 12), r)


def test_svd_leaves_the_random_state_alone() -> None:
    """The randomised method draws from a generator of its own."""
    state = torch.get_rng_state()
    top_r_svd(torch.ones(300, 300), 4)
    assert torch.equal(torch.get_rng_state(), state)


@given(alpha=st.floats(0.1, 100), r=st.integers(1, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_scale_of_loras_form(alpha: float, r: int) -> None:
    """s = α / r; α / √r if rank-stabilised; 1 where α is left to be r."""
    assert lora_scale(alpha, r) == alpha / r
    assert lora_scale(alpha, r, rslora=True) == alpha / math.sqrt(r)
    assert lora_scale(None, r) == 1.0


def test_the_uniform_start_is_that_of_a_linear_layer() -> None:
    """Uniform in ±1/√d_in, from the given generator alone."""
    a, again = (uniform_start((64, 400), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, again)
    assert float(a.abs().max()) <= 1 / 20
    assert float(a.abs().max()) >= 0.99 / 20
    assert float(a.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        (Finite, [-3.0, 0.0, 1e-6, 1e6]),
        (PositiveFinite, [1e-6, 0.5, 1e6]),
        (NonNegativeFinite, [0.0, 1e-6, 1e6]),
        (DropoutRate, [0.0, 1e-6, 0.999]),
    ],
)
def test_numbers_that_would_train_to_nothing_are_refused(kind: object, right: list[float]) -> None:
    """Infinities, NaN, and sizes that float32 holds as 0 or infinity are no fields of a variant."""
    adapter = TypeAdapter(kind)
    assert [adapter.validate_python(value) for value in right] == right
    for value in (math.inf, -math.inf, math.nan, 1e-320, -1e-320, 1e-30, 1e30, 1e308):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


@given(column=st.integers(0, 31), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_probes_see_one_flipped_column_and_not_rounding(column: int, seed: int) -> None:
    """Eight numbers tell a basis with one column flipped from the same one with rounding noise."""
    u, _ = torch.linalg.qr(torch.randn(200, 32, generator=torch.Generator().manual_seed(seed)))
    recorded = probe(u)
    assert probe_agrees(
        u + 1e-6 * torch.randn(200, 32, generator=torch.Generator().manual_seed(seed + 1)), recorded
    )
    flipped = u.clone()
    flipped[:, column] *= -1
    assert not probe_agrees(flipped, recorded)
