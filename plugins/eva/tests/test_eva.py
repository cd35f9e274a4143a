"""EVA: the directions, the single pass in bounded memory, moving ranks, and PEFT."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_eva import EVA
from lora_lite_eva.eva import PrincipalDirections
from torch import Tensor, nn

peft = pytest.importorskip("peft")


def data(rows: int, d_in: int, seed: int = 0, decay: float = 0.5) -> Tensor:
    """Rows around a mean that is not 0, with standard deviations i^-decay in random directions."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(7))).Q
    deviations = torch.arange(1, d_in + 1).pow(-decay)
    return torch.randn(rows, d_in, generator=rng) * deviations @ turn + 2 * turn[-1]


def observed(batches: list[Tensor], kept: int, center: bool) -> dict[str, Tensor]:
    """The statistics after all batches."""
    observer = PrincipalDirections(kept, batches[0].shape[1], center)
    for batch in batches:
        observer.update(batch, batch)
    return observer.result()


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, rslora: bool
) -> None:
    """The same A and B give PEFT's logits and gradients: the forward is LoRA's."""
    equals_peft(
        EVA(r=4, alpha=6.0, rslora=rslora),
        lambda sites: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=sites),
        {"A": theirs("lora_A.default.weight"), "B": theirs("lora_B.default.weight")},
        calibration=[torch.randint(3, 30, (4, 16), generator=torch.Generator().manual_seed(0))],
    )


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    d_in=st.integers(2, 24), center=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_pass_equals_the_full_decomposition(sizes: list[int], d_in: int, center: bool) -> None:
    """However the rows are cut into batches, the result is that of all rows at once."""
    rows = data(sum(sizes), d_in).double()
    found = observed(list(rows.split(sizes)), d_in, center)
    whole = rows - rows.mean(0) if center else rows
    _, s, v = torch.linalg.svd(whole, full_matrices=False)
    count = min(len(s), len(found["singular_values"]))
    torch.testing.assert_close(found["singular_values"][:count], s[:count], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        found["sum_of_squares"].double(), whole.square().sum(), rtol=1e-5, atol=1e-8
    )
    assert int(found["rows"]) == len(rows)
    spanned = int((s > 1e-6 * s[0]).sum())
    clear = [
        i
        for i in range(spanned)
        if all(abs(s[i] - s[j]) > 1e-3 * s[0] for j in range(len(s)) if j != i)
    ]
    for i in clear:
        assert abs(float(v[i] @ found["directions"][i])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_keeping_four_times_the_rank_is_accurate(center: bool) -> None:
    """r = 8 of 256 dimensions, 40 followed: the worst direction has a cosine above 0.9999."""
    rows = data(4000, 256)
    found = observed(list(rows.split(500)), 40, center)["directions"][:8].float()
    whole = rows - rows.mean(0) if center else rows
    exact = torch.linalg.svd(whole, full_matrices=False).Vh[:8]
    assert float(torch.linalg.svdvals(found @ exact.T).min()) > 0.9999


def test_start_and_padding() -> None:
    """A's rows are the principal directions of the rows that the mask keeps; B is 0."""
    model, rows = Masked(), data(64, 12).reshape(4, 16, 12)
    mask = (torch.arange(16) < torch.tensor([[16], [9], [3], [12]])).long()
    before = model(rows)
    poisoned = torch.where(mask[..., None].bool(), rows, 1e4)
    batches = [{"x": poisoned[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    adapter = ll.attach(model, "eva", r=3, targets="layer", calibration=batches)
    a = adapter.state_dict()["layer.A"]
    kept = rows[mask.bool()]
    exact = torch.linalg.svd(kept - kept.mean(0), full_matrices=False).Vh[:3]
    torch.testing.assert_close((a @ exact.T).abs(), torch.eye(3), rtol=1e-4, atol=1e-4)
    assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.equal(model(rows), before)


class Masked(nn.Module):
    """One layer behind a mask argument, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 9)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    """Row i of A has length 1 / √s_i with whiten."""
    rows = data(200, 12)
    adapter = ll.attach(Masked(), "eva", r=3, whiten=True, targets="layer", calibration=[rows])
    s = torch.linalg.svdvals(rows - rows.mean(0))[:3]
    torch.testing.assert_close(
        adapter.state_dict()["layer.A"].norm(dim=1), s.rsqrt(), rtol=1e-4, atol=0
    )


class Towers(nn.Module):
    """Three layers side by side, of the same input at very different spreads of variance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        steep, even = x * torch.arange(1, 17).pow(-3.0), x * torch.arange(1, 17).pow(-0.1)
        return (
            self.blocks[0](steep)
            + self.blocks[1](even)
            + self.blocks[2](x[..., :1] * torch.ones(16) + 1e-2 * x)
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_move_to_where_they_explain_most(rslora: bool) -> None:
    """rho > 1 keeps the r · sites largest shares of variance, at most rho · r at a site."""
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(500, 16)
    before = model(x)
    adapter = ll.attach(model, EVA(r=4, alpha=8.0, rho=2.0, rslora=rslora), calibration=[x])
    ranks = {path: variant.r for path, variant in adapter.sites.items()}
    inputs = {
        "blocks.0": x * torch.arange(1, 17).pow(-3.0),
        "blocks.1": x * torch.arange(1, 17).pow(-0.1),
    }
    inputs["blocks.2"] = x[:, :1] + 1e-2 * x
    shares = []
    for path, rows in inputs.items():
        s = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
        shares += [(float(share), path) for share in (s / s.sum())[:8]]
    wanted = [path for _, path in sorted(shares, reverse=True)[:12]]
    assert ranks == {path: wanted.count(path) for path in dict.fromkeys(wanted)}
    assert sum(ranks.values()) == 12
    assert ranks["blocks.1"] == 8
    for variant in adapter.sites.values():
        assert variant.alpha / (variant.r**0.5 if rslora else variant.r) == pytest.approx(
            8 / (2 if rslora else 4)
        )
    assert torch.equal(model(x), before)


def test_a_site_without_a_share_is_dropped_and_a_file_needs_no_data(tmp_path: Path) -> None:
    """A site that explains nothing is left out; the file loads as specialised, without data."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            few = x.clone()
            few[..., 2:] *= 1e-3
            return self.blocks[0](few) + self.blocks[1](x)

    torch.manual_seed(0)
    model, x = Two(), torch.randn(400, 16)
    adapter = ll.attach(model, "eva", r=1, rho=3.0, calibration=[x])
    assert {path: variant.r for path, variant in adapter.sites.items()} == {"blocks.0": 2}
    for p in adapter.parameters():
        nn.init.normal_(p)
    trained = model(x)
    adapter.save(tmp_path / "eva.safetensors")
    adapter.detach()
    ll.load(model, tmp_path / "eva.safetensors")
    assert torch.equal(model(x), trained)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """What an observer holds is the same after 4 batches as after 40: no Gram matrix."""
    held = []
    for batches in (4, 40):
        observer = PrincipalDirections(8, 400, center=True)
        for i in range(batches):
            observer.update(data(32, 400, seed=i), torch.empty(32, 0))
        tensors = [v for v in vars(observer).values() if isinstance(v, Tensor)]
        held.append(sum(t.untyped_storage().nbytes() for t in tensors))
    assert held[0] == held[1] == 8 * (8 * 400 + 400)


def test_data_is_read_once() -> None:
    """An iterator that can be used once is enough, and nothing of it is kept."""
    tracemalloc.start()
    reads = []

    def batches() -> Iterator[Tensor]:
        for i in range(5):
            reads.append(i)
            yield data(32, 12, seed=i)

    ll.attach(Masked(), "eva", r=3, targets="layer", calibration=batches())
    tracemalloc.stop()
    assert reads == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rows", "told"), [
    (
        data(6, 12),
        r"layer: r=8 directions are to be found, and the 6 .* span only 5 around their mean",
    ),
    (data(1, 12).expand(50, 12), r"layer: r=8 .* 50 calibration tokens here span only 0 around"),
])  # fmt: skip
def test_too_few_tokens_are_refused(rows: Tensor, told: str, untouched: Callable[..., Any]) -> None:
    """Too few tokens, or tokens that do not differ, name the site, and change nothing."""
    model = Masked()
    with untouched(model), pytest.raises(ll.CalibrationError, match=told):
        ll.attach(model, "eva", r=8, targets="layer", calibration=[rows])


def test_missing_data_is_asked_for(untouched: Callable[..., Any]) -> None:
    """Without calibration= it says what to give, and changes nothing."""
    model = Masked()
    with (
        untouched(model),
        pytest.raises(ll.CalibrationError, match=r"needs calibration data\. Give calibration="),
    ):
        ll.attach(model, "eva", targets="layer")


@pytest.mark.parametrize(
    "field", [{"rho": 0.5}, {"rho": float("inf")}, {"r": 0}, {"center": 1}, {"dropout": 1.0}]
)
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """A value outside a field's range names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'eva': {name}={value!r}: "):
        ll.plan(Masked(), "eva", targets="layer", **field)
