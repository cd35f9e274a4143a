"""The shared top-r SVD and the fingerprints of a base."""

from __future__ import annotations

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite.fingerprint import probe, probe_agrees


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
    """Orthonormal U and V, descending S, and U S V the best rank-r approximation.

    The largest entry of each row of V is positive.
    """
    w = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = 1 + round(share * (min(w.shape) - 1))
    u, s, v = ll.top_r_svd(w, r, method)  # type: ignore[arg-type]
    identity = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity)
    torch.testing.assert_close(v @ v.T, identity)
    exact = torch.linalg.svdvals(w)
    torch.testing.assert_close(s, exact[:r])
    torch.testing.assert_close(
        (w - u @ torch.diag(s) @ v).norm(), exact[r:].norm(), rtol=1e-6, atol=1e-9
    )
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(512, 300), (300, 512)])
def test_randomized_svd_of_a_slow_spectrum(shape: tuple[int, int]) -> None:
    """On σᵢ ∝ i^-½ the worst of 32 directions has cosine ≥ 0.9999 with the exact one.

    It has the same sign, every time.
    """
    rng = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 300, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 300, generator=rng))
    w = u @ torch.diag(torch.arange(1, 301).float().rsqrt()) @ v.T
    exact, fast, again = ll.top_r_svd(w, 32, "exact"), ll.top_r_svd(w, 32), ll.top_r_svd(w, 32)
    for one, other in ((exact[0].T, fast[0].T), (exact[2], fast[2])):
        assert float((one * other).sum(1).min()) >= 0.9999
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


def test_svd_leaves_the_random_state_alone() -> None:
    """The randomised method draws from a generator of its own."""
    state = torch.get_rng_state()
    ll.top_r_svd(torch.ones(300, 300), 4)
    assert torch.equal(torch.get_rng_state(), state)


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
