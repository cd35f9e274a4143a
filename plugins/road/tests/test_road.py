"""ROAD: turned pairs, the three ways of sharing, the geometry of groups, and PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lora_lite as ll
import pytest
import torch
from lora_lite_road import ROAD
from lora_lite_road.road import COSINE_MINUS_1
from torch import nn

peft = pytest.importorskip("peft")

Sharing = Literal["road_1", "road_2", "road_4"]
SHARINGS: tuple[Sharing, ...] = ("road_1", "road_2", "road_4")


@pytest.mark.parametrize("sharing", SHARINGS)
def test_logits_and_gradients_equal_pefts(
    equals_peft: Callable[..., None], theirs: Any, sharing: Sharing
) -> None:
    """The same angles and scales give PEFT's logits and gradients, in all ways of sharing."""
    equals_peft(
        ROAD(sharing=sharing, group_size=4),
        lambda sites: peft.RoadConfig(variant=sharing, group_size=4, target_modules=sites),
        {
            "theta": theirs("road_theta.default"),
            "alpha_offset": theirs("road_alpha.default", offset=1.0),
        },
    )


def test_pairs_half_a_group_apart_are_turned() -> None:
    """With one angle a pair and α = 1, outputs j and j + g/2 of a group turn in their plane."""
    model = nn.Sequential(nn.Linear(3, 8)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = model(x)
    theta, _ = ll.attach(model, ROAD(group_size=4), targets="0", dtype=torch.float64).parameters()
    nn.init.normal_(theta)
    turned = model(x)
    for pair, (p, q) in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)]):
        c, s = math.cos(float(theta[pair].detach())), math.sin(float(theta[pair].detach()))
        torch.testing.assert_close(turned[:, p], c * y[:, p] - s * y[:, q], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(turned[:, q], s * y[:, p] + c * y[:, q], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned.norm(dim=1), y.norm(dim=1))


@pytest.mark.parametrize("angle", [1e-4, 1e-2])
def test_small_angles_are_not_lost(angle: float) -> None:
    """c - 1 of a small angle keeps its digits in float32, where cos θ - 1 has few or none."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    adapter = ll.attach(model, ROAD(group_size=4), targets="0")
    theta, _ = adapter.parameters()
    nn.init.constant_(theta, angle)
    site = (
        ll.plan(nn.Sequential(nn.Linear(3, 4)), ROAD(group_size=4), targets="0").placements[0].site
    )
    prepared = adapter.variant.prepare(site, {"theta": theta, "alpha_offset": torch.zeros(2)})
    expected = math.cos(angle) - 1
    torch.testing.assert_close(
        prepared[COSINE_MINUS_1].detach().double().mean().item(), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("sharing", "parameters"), [("road_1", 64), ("road_2", 128), ("road_4", 256)]
)
def test_parameter_counts(sharing: Sharing, parameters: int) -> None:
    """d_out, 2 d_out or 4 d_out numbers; no matrix product."""
    found = ll.plan(nn.Sequential(nn.Linear(32, 64)), "road", sharing=sharing, targets="0")
    assert found.parameters == parameters
    assert found.macs_per_token == found.macs_per_forward == 0


def test_road_4_leaves_the_angles_of_c_where_they_are() -> None:
    """The slope of cos θ at 0 is 0: these angles never move; all other numbers do, in time."""
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(16, 6)
    adapter = ll.attach(model, ROAD(sharing="road_4", group_size=4), targets="0")
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().sum().backward()
        optimizer.step()
    theta, offset = (p.detach().reshape(2, 2, 4) for p in adapter.parameters())
    assert not theta[:, 0].any()
    assert bool(theta[:, 1].all())
    assert bool(offset.all())


@pytest.mark.parametrize(("d_out", "group_size", "told"), [
    (96, 64, r"group_size: 64 does not divide d_out=96; possible are 2, 4, 6, 8, 12, 16, 24, 32, "),
    (7, 2, r"group_size: 2 does not divide d_out=7, which is odd: outputs cannot be paired"),
])  # fmt: skip
def test_group_that_does_not_divide_is_refused(
    d_out: int, group_size: int, told: str, untouched: Callable[..., Any]
) -> None:
    """The error names the site, the field and the sizes that would do, and nothing is changed."""
    model = nn.Sequential(nn.Linear(4, d_out))
    with (
        untouched(model),
        pytest.raises(ll.MisfitError, match=rf"0 \(4 -> {d_out}\): road: {told}"),
    ):
        ll.attach(model, "road", group_size=group_size, targets="0")


@pytest.mark.parametrize("field", [{"group_size": 3}, {"group_size": 0}, {"sharing": "road_3"}])
def test_bad_fields_are_named(field: dict[str, object]) -> None:
    """An odd group, or an unknown way of sharing, names the variant, the field and the value."""
    (name, value), *_ = field.items()
    with pytest.raises(ll.FieldError, match=rf"'road': {name}={value!r}: "):
        ll.plan(nn.Sequential(nn.Linear(4, 4)), "road", targets="0", **field)
