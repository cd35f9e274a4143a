"""BOFT: agreement with PEFT and with dense butterflies, orthogonality, reach, and the counts."""

from __future__ import annotations

import lora_lite as ll
import pytest
import torch
from lora_lite_oft import BOFT
from torch import Tensor, nn

peft = pytest.importorskip("peft")


def skew(entries: Tensor, b: int) -> Tensor:
    """The skew matrices with these entries above the diagonal, row by row."""
    matrices = entries.new_zeros(*entries.shape[:-1], b, b)
    row, column = torch.triu_indices(b, b, 1)
    matrices[..., row, column] = entries
    return matrices - matrices.mT


def dense_turn(q: Tensor, b: int) -> Tensor:
    """B_m ⋯ B_1 with PEFT's own permutations, written out: x' = x B_m ⋯ B_1."""
    factors, n, _ = q.shape
    d_in = n * b
    identity = torch.eye(b, dtype=q.dtype)
    turn = torch.eye(d_in, dtype=q.dtype)
    for level in range(factors):
        s = skew(q[level], b)
        blocks = torch.block_diag(*((identity - s) @ torch.linalg.inv(identity + s)))
        order = peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm(
            None, d_in, n // 2**level, b // 2, factors - 1
        )
        permutation = torch.eye(d_in, dtype=q.dtype)[order]
        turn = permutation @ blocks @ permutation.T @ turn
    return turn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("factors", "d_in", "d_out"), [(1, 24, 10), (2, 48, 7), (3, 32, 40)])
def test_outputs_and_gradients_equal_a_dense_butterfly(
    factors: int, d_in: int, d_out: int, bias: bool
) -> None:
    """y = (1 + s) ⊙ (W x') + b with the product of the dense factors, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    variant = BOFT(block_size=4, factors=factors)
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64)
    named = dict(adapter.named_parameters())
    q, s = named["0.Q"], named["0.s"]
    for parameter in (q, s):
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(5, d_in, dtype=torch.float64)

    weights = torch.randn(5, d_out, dtype=torch.float64)
    found = model(x)
    (found * weights).sum().backward()

    theirs = [parameter.detach().clone().requires_grad_() for parameter in (q, s)]
    linear = model[0]
    expected = (1 + theirs[1]) * (x @ dense_turn(theirs[0], 4) @ linear.weight.T)
    if bias:
        expected = expected + linear.bias
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, other in zip((q, s), theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_factor_equals_pefts() -> None:
    """PEFT computes one factor where its CUDA extension is missing: the same outputs."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(24, 10)).double()
    base = nn.Sequential(nn.Linear(24, 10)).double()
    base.load_state_dict(ours.state_dict())
    adapter = ll.attach(ours, BOFT(block_size=4, factors=1), targets="0", dtype=torch.float64)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()
    named = dict(theirs.named_parameters())
    q, s = (dict(adapter.named_parameters())[name] for name in ("0.Q", "0.s"))
    with torch.no_grad():
        for parameter in (q, s):
            parameter.normal_(std=0.5)
        named["base_model.model.0.boft_R.default"].copy_(skew(q, 4))
        named["base_model.model.0.boft_s.default"].copy_(1 + s[:, None])
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_lengths_are_kept_and_the_reach_doubles() -> None:
    """The input is turned, whatever Q; with m factors one input reaches b 2^(m-1) others."""
    for factors in (1, 2, 3):
        model = nn.Sequential(nn.Linear(32, 32, bias=False)).double()
        nn.init.eye_(model[0].weight)
        variant = BOFT(block_size=4, factors=factors)
        adapter = ll.attach(model, variant, targets="0", dtype=torch.float64)
        nn.init.normal_(dict(adapter.named_parameters())["0.Q"], std=3)
        turned = model(torch.eye(32, dtype=torch.float64)).detach()
        torch.testing.assert_close(
            turned @ turned.T, torch.eye(32, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        assert int((turned.abs() > 1e-12).sum(1).max()) == 4 * 2 ** (factors - 1)


def test_counts(qwen_down_proj: nn.Module) -> None:
    """On 24 down_proj of a 0.8B Qwen3.5: m d_in (b - 1) / 2 + d_out parameters, m d_in b MACs."""
    found = ll.plan(qwen_down_proj, "boft", block_size=8, factors=2)
    assert found.parameters == 24 * (2 * 3584 * 7 // 2 + 1024)
    assert found.macs_per_token == 24 * 2 * 3584 * 8


def test_a_layer_without_room_is_refused() -> None:
    with pytest.raises(ll.MisfitError, match="2\\^3 does not divide d_in=12"):
        ll.attach(nn.Sequential(nn.Linear(12, 4)), "boft", factors=3, targets="0")
