"""Which layers an adapter goes to, and plan(): as attach, without touching the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite.author import LayerKindError, Rng, Site, Tensors, TensorSpec, Variant, check_rank
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Refused = Callable[..., AbstractContextManager[Any]]


class Low(Variant, name="low"):
    """A rank-r update that starts at 0."""

    r: int = 2

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {
            "A": torch.randn(self.r, site.d_in, generator=rng("A")),
            "B": torch.zeros(site.d_out, self.r),
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return x @ t["A"].T @ t["B"].T

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)


class LowUp(Low, name="low_up"):
    """The same, for `up` layers by default."""

    default_targets = ("up$",)


class LowBoth(Low, name="low_both"):
    """The same, with two patterns by default."""

    default_targets = ("up$", "down$")


def sites(model: nn.Module, variant: Variant | None = None, **arguments: Any) -> list[str]:
    """The paths that plan chooses."""
    return [p.path for p in ll.plan(model, variant or Low(), **arguments).placements]


def test_default_is_every_linear_layer_of_the_repeated_blocks(blocks: Make) -> None:
    """Not the stem, not the head: what lies in a ModuleList. A variant's own default is first."""
    assert sites(blocks()) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert sites(blocks(), LowUp()) == ["blocks.0.up", "blocks.1.up"]
    assert sites(blocks(), LowUp(), targets="stem") == ["stem"]


def test_exclude_may_take_away_all_of_one_default_pattern(blocks: Make, refused: Refused) -> None:
    """The patterns are the variant's, not the user's: what is left of them together counts.

    A user's own pattern that is left without a layer is an error.
    """
    assert sites(blocks(), LowBoth(), exclude="down") == ["blocks.0.up", "blocks.1.up"]
    fields = {"argument": "exclude", "layers": ("blocks.0.down", "blocks.1.down")}
    with refused(None, ll.TargetError, ("targets='down$'",), **fields):
        sites(blocks(), targets=["up$", "down$"], exclude="down")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": "up"}, ["blocks.0.up", "blocks.1.up"]),
        ({"targets": r"0\.(up|down)$"}, ["blocks.0.up", "blocks.0.down"]),
        ({"targets": ["stem", "1.down"]}, ["stem", "blocks.1.down"]),
        (
            {"targets": "."},
            ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"],
        ),
        ({"targets": "head", "exclude": ()}, ["lm_head"]),
        ({"exclude": "down"}, ["blocks.0.up", "blocks.1.up"]),
        ({"exclude": ["down", r"\b0\b"]}, ["blocks.1.up"]),
        ({"layers": 1}, ["blocks.1.up", "blocks.1.down"]),
        ({"layers": range(1), "targets": "up"}, ["blocks.0.up"]),
        ({"layers": [0, 1], "exclude": "up"}, ["blocks.0.down", "blocks.1.down"]),
    ],
)
def test_choices(blocks: Make, arguments: dict[str, Any], expected: list[str]) -> None:
    """targets, exclude and layers, one or several, in the model's order; attach follows plan."""
    model = blocks()
    assert sites(model, **arguments) == expected
    assert list(ll.attach(model, Low(), **arguments).sites) == expected


def test_overrides(blocks: Make) -> None:
    """Other fields at some sites: the later pattern wins, field by field; others keep theirs."""
    model = blocks()
    adapter = ll.attach(model, Low(r=3), overrides={"up": {"r": 4}, r"0\.up": {"r": 5}})
    assert {path: v.r for path, v in adapter.sites.items()} == {  # type: ignore[attr-defined]
        "blocks.0.up": 5,
        "blocks.0.down": 3,
        "blocks.1.up": 4,
        "blocks.1.down": 3,
    }
    assert adapter.variant == Low(r=3)
    assert adapter.num_parameters == 20 * (5 + 3 + 4 + 3)


def test_the_head_by_any_name(tiny_llama: Make) -> None:
    """The output head is left out by its name, and by get_output_embeddings whatever its name."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])
            self.to_words = nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.to_words

    assert sites(Renamed(), targets=".") == ["blocks.0"]
    assert not any("head" in path for path in sites(tiny_llama(), targets="."))


def test_linear_layers_directly_in_a_list_and_nested_lists() -> None:
    """Layers that are a list's own members are its blocks.

    In nested lists the outer index counts for layers=.
    """
    model = nn.ModuleDict(
        {
            "flat": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            "grid": nn.ModuleList(
                [nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2)]
            ),
        }
    )
    assert sites(model) == ["flat.0", "flat.1", "grid.0.0", "grid.0.1", "grid.1.0", "grid.1.1"]
    assert sites(model, layers=1, targets="grid") == ["grid.1.0", "grid.1.1"]


def test_a_shared_module_is_one_site() -> None:
    """A layer under two paths is adapted once, under its first path.

    Patterns and layers= match any of its paths.
    """
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                [nn.ModuleDict({"first": shared}), nn.ModuleDict({"second": shared})]
            )
        }
    )
    for arguments in ({}, {"targets": "second"}, {"layers": 1}, {"layers": 0}):
        assert sites(model, **arguments) == ["layers.0.first"]  # type: ignore[arg-type]
    adapter = ll.attach(model, Low())
    nn.init.ones_(shared.lora_default_B)
    assert len(shared._forward_hooks) == 1
    assert adapter.num_parameters == 16
    adapter.detach()


def test_layers_that_hooks_do_not_reach(refused: Refused) -> None:
    """nn.MultiheadAttention reads out_proj's weight without calling it: refused.

    It is named by plan when it is not asked for.
    """
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    fields = {"argument": "targets", "layers": ("0.self_attn.out_proj",)}
    with refused(model, ll.TargetError, ("MultiheadAttention", "exclude="), **fields):
        ll.attach(model, Low())
    found = ll.plan(model, Low(), exclude="out_proj")
    assert [p.path for p in found.placements] == ["0.linear1", "0.linear2"]
    assert (
        "0.self_attn.in_proj_weight (24 x 8) is a bare parameter of MultiheadAttention, not a layer"
        in found.unreachable
    )
    assert any("0.self_attn.out_proj" in text for text in found.unreachable)
    assert "out of reach: 0.self_attn.in_proj_weight" in str(found)


class Quantized(nn.Linear):
    """Computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).round()


class Renamed(nn.Linear):
    """Computes what nn.Linear does."""


class LooksLinear(nn.Module):
    """Not an nn.Linear, but with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.codes = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    "odd",
    [Quantized(4, 4), LooksLinear(), nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))],
    ids=lambda m: type(m).__name__,
)
def test_unknown_linear_layers_are_named(odd: nn.Module, refused: Refused) -> None:
    """A subclass with its own forward, a look-alike, a parametrized layer: never passed over.

    They are refused with the ways out.
    """
    model = nn.ModuleList([nn.ModuleDict({"odd": odd, "plain": nn.Linear(4, 4)})])
    says = (f"{type(odd).__name__}", "exclude=", "lora_lite.layers")
    with refused(model, LayerKindError, says, argument="targets", layers=("0.odd",)):
        ll.attach(model, Low())
    found = ll.plan(model, Low(), exclude="odd")
    assert [p.path for p in found.placements] == ["0.plain"]
    assert any(text.startswith("0.odd") for text in found.unreachable)


def test_a_subclass_that_keeps_the_forward_is_linear() -> None:
    """Only what a layer computes matters, not its class's name."""
    assert sites(nn.ModuleList([Renamed(4, 4)])) == ["0"]


def test_plan_is_what_attach_does(
    blocks: Make, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    """On the meta device, without touching it: same sites, parameters and MACs as attach gives."""
    with torch.device("meta"):
        empty = blocks()
    with untouched(real := blocks()):
        on_real = ll.plan(real, Low(r=3), layers=1)
    before = [(name, p.requires_grad) for name, p in empty.named_parameters()]
    found = ll.plan(empty, Low(r=3), layers=1)
    assert before == [(name, p.requires_grad) for name, p in empty.named_parameters()]
    adapter = ll.attach(real, Low(r=3), layers=1)
    assert str(found) == str(on_real)
    assert [p.path for p in found.placements] == list(adapter.sites)
    assert found.parameters == adapter.num_parameters == 3 * 20 * 2
    assert (
        (found.macs_per_token, found.macs_per_forward)
        == (adapter.macs_per_token, adapter.macs_per_forward)
        == (120, 0)
    )
    assert all(
        text in str(found) for text in ("low(r=3)", "blocks.1.up", "8 -> 12", "2 layers", "120")
    )


def test_experts_are_chosen_by_a_pattern() -> None:
    """The default adapts linear layers; experts are there for who asks for them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    found = ll.plan(model, Low())
    assert "model.layers.0.self_attn.q_proj" in [p.path for p in found.placements]
    paths = [p.path for p in ll.plan(model, Low(), targets="_proj$").placements]
    for name in ("gate_up_proj", "down_proj"):
        assert f"model.layers.0.mlp.experts.{name}" not in [p.path for p in found.placements]
        assert f"model.layers.0.mlp.experts.{name}" in paths
