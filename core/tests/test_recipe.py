"""Recipes: one adapter of several variants, chosen by patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import Observer, Rng, Site, Tensors, TensorSpec, Variant, cli, fileformat
from torch import Tensor, nn

Make = Callable[..., nn.Module]

X = torch.linspace(-1, 1, 24).reshape(3, 8)
UP, DOWN = r"up$", r"down$"


class Low(Variant, name="low"):
    """A rank-r update that starts at 0."""

    r: int = 2

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        ll.check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        a = torch.randn(self.r, site.d_in, generator=rng("A"))
        return {"A": a, "B": torch.zeros(site.d_out, self.r)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return x @ t["A"].T @ t["B"].T

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)


class Gate(Variant, name="gate"):
    """A gate on every output, closed at first."""

    strength: float = 1.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"g": TensorSpec((site.d_out,), decay=False)}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"g": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return self.strength * t["g"] * y


class Mean(Gate, name="mean"):
    """A gate that starts at the mean of the outputs that it has seen."""

    def observe(self, site: Site) -> Observer:
        return MeanOutput()

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"g": statistics["mean"]}

    @property
    def identity(self) -> Any:
        return "none"


class MeanOutput:
    """The mean of a layer's outputs."""

    def __init__(self) -> None:
        self.sum = torch.zeros(())
        self.rows = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        self.sum = self.sum + y.sum(0)
        self.rows += len(y)

    def result(self) -> dict[str, Tensor]:
        return {"mean": self.sum / self.rows}


def variants(adapter: ll.Adapter) -> dict[str, str]:
    """What is on each layer, as text."""
    return {path: str(variant) for path, variant in adapter.sites.items()}


def fill(adapter: ll.Adapter) -> None:
    """Give every parameter of an adapter values that are not its start."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))


# --- the choice of layers


def test_every_layer_gets_the_variant_of_its_pattern(blocks: Make) -> None:
    """One adapter with two variants: on each layer the one whose pattern matches, and no other."""
    adapter = ll.attach(blocks(), {UP: Low(r=3), DOWN: Gate()})
    assert variants(adapter) == {
        "blocks.0.up": "low(r=3)",
        "blocks.0.down": "gate(strength=1.0)",
        "blocks.1.up": "low(r=3)",
        "blocks.1.down": "gate(strength=1.0)",
    }


def test_the_deltas_are_those_of_two_adapters(blocks: Make) -> None:
    """A recipe computes what its variants compute as adapters of their own, bit for bit."""
    one, two = blocks(), blocks()
    fill(ll.attach(one, {UP: Low(), DOWN: Gate()}))
    ll.attach(two, Low(), targets=UP, name="low")
    ll.attach(two, Gate(), targets=DOWN, name="gate")
    values = dict(ll.adapters(one)["default"].named_parameters())
    for adapter in ll.adapters(two).values():
        for name, parameter in adapter.named_parameters():
            parameter.data.copy_(values[name].data)
    assert not torch.equal(one(X), blocks()(X))
    assert torch.equal(one(X), two(X))


def test_a_variant_is_a_name_a_name_with_fields_or_an_instance(blocks: Make) -> None:
    """The three ways in which a recipe can say its variants."""
    adapter = ll.attach(
        blocks(), {r"0\.up$": "lora", r"1\.up$": ("lora", {"r": 3}), DOWN: Low(r=4)}
    )
    assert [variant.r for variant in adapter.sites.values()] == [8, 4, 3, 4]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({}, "the recipe is empty"),
        ({UP: 3}, "3 is not a variant"),
        ({UP: ("lora", {"rank": 3})}, "there is no field 'rank'"),
        ({UP: "lroa"}, "there is no variant 'lroa'"),
        ({"(": Low()}, "is not a regular expression"),
        ({UP: Low(), "upp$": Gate()}, r"recipe='upp\$' matches none of these layers"),
        ({UP: Low(r=99), DOWN: Gate()}, "low: r: 99 is larger"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(
    blocks: Make, recipe: Any, problem: str, untouched: Any
) -> None:
    """Before anything is changed, with the words that a single variant's mistake has."""
    model = blocks()
    with untouched(model), pytest.raises(ll.LoraLiteError, match=problem):
        ll.attach(model, recipe)


@pytest.mark.parametrize("arguments", [{"targets": UP}, {"r": 4}])
def test_arguments_of_a_single_variant_are_refused(blocks: Make, arguments: dict[str, Any]) -> None:
    """`targets=` and fields belong to one variant; a recipe says both itself."""
    name = next(iter(arguments))
    with pytest.raises(ll.LoraLiteError, match=name):
        ll.attach(blocks(), {UP: Low()}, **arguments)


def test_two_patterns_for_one_layer_are_named(blocks: Make, untouched: Any) -> None:
    """No order of precedence: the error names both patterns and the layer."""
    model = blocks()
    with untouched(model), pytest.raises(ll.TargetError) as caught:
        ll.attach(model, {r"blocks\.0": Low(), UP: Gate()})
    assert caught.value.layers == ("blocks.0.up",)
    for text in ("blocks.0.up", r"'blocks\\.0'", "'up$'"):
        assert text in str(caught.value)


def test_one_instance_under_two_patterns_is_no_conflict(blocks: Make) -> None:
    """Patterns that overlap and give the same variant agree."""
    low = Low()
    adapter = ll.attach(blocks(), {UP: low, r"blocks\.0": low})
    assert list(adapter.sites) == ["blocks.0.up", "blocks.0.down", "blocks.1.up"]


def test_layers_exclude_and_overrides_hold_for_all_variants(blocks: Make) -> None:
    """What narrows the choice of layers, or changes fields, applies to the recipe as a whole."""
    found = ll.plan(
        blocks(),
        {r"up$|down$": Low(), "head": Gate()},
        exclude=r"1\.down",
        overrides={r"1\.up": {"r": 5}, "head": {"strength": 2.0}},
    )
    assert {p.path: str(p.variant) for p in found.placements} == {
        "blocks.0.up": "low(r=2)",
        "blocks.0.down": "low(r=2)",
        "blocks.1.up": "low(r=5)",
        "lm_head": "gate(strength=2.0)",
    }
    of_one_block = ll.plan(blocks(), {UP: Low(), DOWN: Gate()}, layers=1)
    assert [p.path for p in of_one_block.placements] == ["blocks.1.up", "blocks.1.down"]
    with pytest.raises(ll.FieldError, match="there is no field 'r'"):
        ll.plan(blocks(), {UP: Low(), DOWN: Gate()}, overrides={".": {"r": 3}})


# --- what it tells


def test_plan_and_repr_show_every_pattern(blocks: Make) -> None:
    """The table and the repr name both variants; parameters and MACs are the sums."""
    recipe = {UP: Low(r=3), DOWN: Gate()}
    plan = ll.plan(blocks(), recipe)
    adapter = ll.attach(blocks(), recipe)
    for text in (r"'up$': low(r=3)", r"'down$': gate(strength=1.0)"):
        assert text in str(plan)
        assert text in repr(adapter)
    assert plan.parameters == adapter.num_parameters == 2 * (3 * 20 + 8)
    assert plan.macs_per_token == adapter.macs_per_token == 2 * 3 * 20
    for whole in (plan, adapter):
        with pytest.raises(ll.AdapterError, match=r"recipe of several variants(?s:.*)sites"):
            assert whole.variant


def test_weight_decay_is_each_variants_own(blocks: Make) -> None:
    """The gates do not decay, the factors do."""
    adapter = ll.attach(blocks(), {UP: Low(), DOWN: Gate()})
    sizes = {
        group["weight_decay"]: sum(p.numel() for p in group["params"])
        for group in adapter.param_groups(weight_decay=0.5)
    }
    assert sizes == {0.5: 2 * 2 * 20, 0.0: 2 * 8}


def test_calibration_goes_to_the_layers_that_ask_for_it(blocks: Make) -> None:
    """Only one variant observes; its layers start from their own statistics, the others do not."""
    model = blocks()
    seen: list[Tensor] = []
    model.blocks[1].down.register_forward_hook(lambda *call: seen.append(call[2]))  # type: ignore[union-attr, arg-type]
    model(X)
    expected = seen[0].mean(0)
    adapter = ll.attach(model, {UP: Low(), DOWN: Mean()}, calibration=[X])
    values = dict(adapter.named_parameters())
    torch.testing.assert_close(values["blocks.1.down.g"].data, expected.detach())
    assert not values["blocks.1.up.B"].any()
    adapter.detach()
    with pytest.raises(ll.CalibrationError, match="needs calibration data"):
        ll.attach(model, {UP: Low(), DOWN: Mean()})


def test_eva_beside_lora(tiny_llama: Make) -> None:
    """EVA's ranks are shared out among its own layers, whatever else the recipe holds."""
    batches = [{"input_ids": torch.randint(32, (4, 16))} for _ in range(4)]
    recipe = {r"[qkv]_proj$": ("eva", {"r": 2, "rho": 2.0}), "down_proj$": ("lora", {"r": 3})}
    adapter = ll.attach(tiny_llama(), recipe, calibration=batches)
    ranks: dict[str, list[int]] = {}
    for variant in adapter.sites.values():
        ranks.setdefault(variant.name, []).append(variant.r)  # type: ignore[attr-defined]
    assert ranks["lora"] == [3, 3]
    assert sum(ranks["eva"]) <= 2 * 6
    assert max(ranks["eva"]) <= 4


# --- its file


def test_a_recipe_survives_its_file(
    blocks: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Save and load give back the same variants, tensors and outputs bit for bit, and again."""
    model = blocks()
    adapter = ll.attach(model, {UP: Low(r=3), DOWN: Gate()}, overrides={r"0\.up": {"r": 4}})
    fill(adapter)
    adapter.scale = 0.5
    adapter.save(tmp_path / "first")
    other = blocks()
    loaded = ll.load(other, tmp_path / "first", variant=[Low, Gate])
    assert variants(loaded) == variants(adapter)
    assert torch.equal(other(X), model(X))
    loaded.save(tmp_path / "second")
    (described, tensors), (again, same) = (
        fileformat.read(tmp_path / name) for name in ("first", "second")
    )
    assert again == described
    assert {key: t.tolist() for key, t in same.items()} == {
        k: t.tolist() for k, t in tensors.items()
    }
    assert cli.main(["inspect", str(tmp_path / "first")]) == 0
    told = capsys.readouterr().out
    for text in ("file format 2", "low (format 1)", "gate (format 1)", '{"r":4}', "blocks.1.down"):
        assert text in told


@pytest.mark.parametrize("given", [Low, [Low], []])
def test_loading_asks_for_every_class(blocks: Make, tmp_path: Path, given: Any) -> None:
    """A class that is neither given nor installed is named, and nothing is attached."""
    ll.attach(model := blocks(), {UP: Low(), DOWN: Gate()}).save(tmp_path / "file")
    ll.detach(model)
    with pytest.raises(ll.UnknownVariantError, match=r"there is no variant '(gate|low)'"):
        ll.load(model, tmp_path / "file", variant=given)
    assert not ll.adapters(model)


def test_loading_refuses_classes_that_the_file_does_not_have(blocks: Make, tmp_path: Path) -> None:
    """A class too many is a mistake: the file is probably not the one that was meant."""
    ll.attach(blocks(), {UP: Low(), DOWN: Gate()}).save(tmp_path / "file")
    with pytest.raises(ll.AdapterFileError, match=r"'gate', 'low', and variant= gives 'mean'"):
        ll.load(blocks(), tmp_path / "file", variant=[Low, Gate, Mean])


def test_detach_gives_the_model_back(blocks: Make, untouched: Any) -> None:
    """Tensors and hooks of all variants leave together."""
    model = blocks()
    with untouched(model):
        adapter = ll.attach(model, {UP: Low(), DOWN: Gate()})
        fill(adapter)
        model(X)
        adapter.detach()


def test_a_state_dict_goes_back_into_a_recipe(blocks: Make) -> None:
    """One flat state dict for all variants, strict both ways."""
    model = blocks()
    adapter = ll.attach(model, {UP: Low(), DOWN: Gate()})
    fill(adapter)
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    before = model(X)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    adapter.load_state_dict(state)
    assert torch.equal(model(X), before)
    with pytest.raises(ll.AdapterFileError, match=r"blocks\.0\.down\.g: missing"):
        adapter.load_state_dict({k: v for k, v in state.items() if k != "blocks.0.down.g"})
