"""The stages of the contract that LoRA and AntiPaSTO do not use, several adapters at once, and
variants written anywhere.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lora_lite as ll
import pytest
import torch
from lora_lite import fileformat
from lora_lite.author import (
    Observer,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    VariantContractError,
    VariantDefinitionError,
    check_rank,
)
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Refused = Callable[..., AbstractContextManager[Any]]


class Base(Variant):
    """A vector that is added to the output, 0 at first."""

    r: int = 2

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {
            name: torch.zeros(spec.shape, dtype=spec.dtype)
            for name, spec in self.tensors(site).items()
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["v"].expand_as(y)


class Plain(Base, name="plain"):
    """Base, with a name."""


class Squared(Base, name="squared"):
    """Its prepare multiplies matrices that the spec wants in float32."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,), compute="float32")}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        square = t["v"][:, None] @ t["v"][None]
        assert square.dtype == torch.float32, f"prepare computed in {square.dtype}"
        return {"square": square.diagonal()}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["square"].to(y.dtype).expand_as(y)


def ones(adapter: ll.Adapter, value: float = 1.0) -> None:
    """Set every trainable tensor."""
    for p in adapter.parameters():
        nn.init.constant_(p, value)


def reloaded(adapter: ll.Adapter, model: nn.Module, path: Path) -> ll.Adapter:
    """Save, and load onto another model by the variant's class."""
    adapter.save(path)
    return ll.load(model, path, variant=type(adapter.variant))


# --- the stages


class Energy:
    """The mean square of a site's output."""

    def __init__(self) -> None:
        self.squares, self.rows = torch.zeros(()), 0

    def update(self, x: Tensor, y: Tensor) -> None:
        self.squares += y.square().mean(-1).sum()
        self.rows += len(y)

    def result(self) -> dict[str, Tensor]:
        return {"energy": self.squares / self.rows}


class Sharing(Base, name="sharing"):
    """Ranks by energy: the loudest site gets the others' too, the quietest none."""

    what: str = "ranks"

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        return {"v": TensorSpec((site.d_out,)), "w": TensorSpec((self.r,))}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (t["v"] * t["w"].sum()).expand_as(y)

    def observe(self, site: Site) -> Observer | None:
        return Energy()

    def specialize(
        self, sites: Mapping[str, Site], statistics: Mapping[str, Tensors]
    ) -> Mapping[str, Variant | None]:
        assert sites.keys() == statistics.keys()
        order = sorted(sites, key=lambda path: float(statistics[path]["energy"]))
        chosen: dict[str, dict[str, Variant | None]] = {
            "ranks": {order[0]: None, order[-1]: self.model_copy(update={"r": 2 * self.r})},
            "nothing": {},
            "too large": {order[0]: self.model_copy(update={"r": 99})},
            "elsewhere": {"no.such.site": None},
            "another class": {order[0]: Plain()},
            "none": dict.fromkeys(order),
        }
        return chosen[self.what]


def test_specialize_chooses_per_site_variants_and_drops_sites(blocks: Make, tmp_path: Path) -> None:
    """What specialize returns decides each site's tensors; None drops a site whole.

    Files hold each site's own fields.
    """
    model = blocks()
    data = [torch.randn(20, 8)]
    adapter = ll.attach(model, Sharing(r=2), calibration=data)
    ranks = sorted(v.r for v in adapter.sites.values())  # type: ignore[attr-defined]
    assert ranks == [2, 2, 4]
    (dropped,) = {
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    } - adapter.sites.keys()
    layer = model.get_submodule(dropped)
    assert not layer._forward_hooks
    assert set(dict(layer.named_parameters())) <= {"weight", "bias"}
    ones(adapter)
    again = reloaded(adapter, fresh := blocks(), tmp_path / "a")
    assert again.sites == adapter.sites
    assert torch.equal(fresh(data[0]), model(data[0]))


@pytest.mark.parametrize(
    ("what", "error", "fields", "says"),
    [
        ("too large", ll.MisfitError, {"argument": "targets"}, ("99", "1 of 4 layers")),
        ("elsewhere", VariantContractError, {"variant": "sharing"}, ("no.such.site",)),
        ("another class", VariantContractError, {"variant": "sharing"}, ("plain(r=2)",)),
        ("none", ll.TargetError, {"argument": "targets"}, ("sharing", "4 layers")),
    ],
)
def test_specialize_against_its_contract(
    blocks: Make, refused: Refused, what: str, error: Any, fields: Any, says: tuple[str, ...]
) -> None:
    """Ranks that do not fit, sites it was not given, another class, nothing left: errors."""
    model = blocks()
    with refused(model, error, says, **fields):
        ll.attach(model, Sharing(what=what), calibration=[torch.randn(20, 8)])
    assert (
        len(ll.attach(model, Sharing(what="nothing"), calibration=[torch.randn(20, 8)]).sites) == 4
    )


class Trained(Base, name="trained"):
    """Penalises and limits its vector; its scale vector must not decay."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            "v": TensorSpec((site.d_out,)),
            "s": TensorSpec((1,), decay=False),
            "f": TensorSpec((3,), trainable=False),
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (t["v"] * t["s"]).expand_as(y)

    def penalty(self, site: Site, t: Tensors) -> Tensor | None:
        return t["v"].square().sum() if site.path.endswith("up") else None

    def project(self, site: Site, t: Tensors) -> None:
        t["v"].clamp_(-0.5, 0.5)


def test_penalty_is_summed_and_has_a_gradient(blocks: Make) -> None:
    """penalty() adds the sites' terms, leaves out None, and is 0 for a variant without."""
    adapter = ll.attach(blocks(), Trained())
    ones(adapter, 2.0)
    penalty = adapter.penalty()
    assert penalty.item() == 2 * 12 * 4
    penalty.backward()
    assert {n for n, p in adapter.named_parameters() if p.grad is not None} == {
        "blocks.0.up.v",
        "blocks.1.up.v",
    }
    assert ll.attach(blocks(), Plain()).penalty().item() == 0


def test_project_after_every_step(blocks: Make) -> None:
    """project_after(optimizer) brings tensors back after each step.

    It ends when its handle is removed, or the adapter detached.
    """
    model = blocks()
    adapter = ll.attach(model, Trained())
    ones(adapter)
    optimizer = torch.optim.SGD(adapter.param_groups(), lr=1.0)
    handle = adapter.project_after(optimizer)

    def largest() -> float:
        vectors = [p.detach() for n, p in adapter.named_parameters() if n.endswith("v")]
        return max(float(vector.abs().max()) for vector in vectors)

    for _ in range(2):
        (10 * model(torch.randn(4, 8))).square().sum().backward()
        optimizer.step()
        assert largest() == 0.5
        ones(adapter)
    handle.remove()
    optimizer.step()
    assert largest() > 0.5
    adapter.project_after(optimizer)
    adapter.project()
    assert largest() == 0.5
    adapter.detach()
    optimizer.step()


def test_param_groups_keep_decay_off(blocks: Make) -> None:
    """Every trainable tensor is in one group, and frozen ones in none.

    Those that must not decay have weight decay 0.
    """
    adapter = ll.attach(blocks(), Trained())
    decaying, still = adapter.param_groups(weight_decay=0.1)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert {p.numel() for p in still["params"]} == {1}
    assert len(decaying["params"]) == len(still["params"]) == 4
    assert len(ll.attach(blocks(), Plain()).param_groups(0.1)) == 1


class Turning(Variant, name="turning"):
    """Δx = k x, with a prepared norm that is constant to gradients.

    It applies the scale itself, squared.
    """

    detached: ClassVar[tuple[str, ...]] = ("norm",)
    takes_scale: ClassVar[bool] = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"k": TensorSpec((site.d_in,), compute="float32")}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"k": torch.rand(site.d_in, generator=rng("k"))}

    def prepare(self, site: Site, t: Tensors, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"norm": t["k"].norm(), "factor": scale**2 * t["k"]}

    def delta_input(self, site: Site, t: Tensors, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * (t["factor"] / t["norm"]).to(x.dtype)


def test_input_delta_scale_and_detached_prepare() -> None:
    """x' = x + Δx, also for a keyword input, and with the scale where a method takes it.

    A detached name has no gradient.
    """
    layer = nn.Linear(6, 4)
    model = nn.ModuleList([layer])
    x = torch.randn(3, 6)
    adapter = ll.attach(model, Turning(), name="t")
    k = layer.lora_t_k
    for scale in (1.0, 0.5, -2.0):
        adapter.scale = scale
        expected = nn.functional.linear(x + scale**2 * x * k / k.norm(), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(input=x), expected)
    adapter.scale = 1.0
    layer(x).sum().backward()
    constant = k.detach().norm()
    (expected_grad,) = torch.autograd.grad(
        nn.functional.linear(x + x * k / constant, layer.weight, layer.bias).sum(), k
    )
    torch.testing.assert_close(k.grad, expected_grad)


def test_compute_dtypes_on_a_bfloat16_base() -> None:
    """Parameters are stored in float32 and read as the spec says.

    What was cast by half() is cast again on reading.
    """
    layer = nn.Linear(6, 4).bfloat16()
    model = nn.ModuleList([layer])
    adapter = ll.attach(model, Turning())
    assert layer.lora_default_k.dtype == torch.float32
    x = torch.randn(3, 6).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert layer.lora_default_k.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), y, rtol=0.02, atol=0.02)
    adapter.detach()


class Packed(Base, name="packed"):
    """Saves twice its vector, under another name, and in two halves."""

    def state_dict(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        first, second = (2 * t["v"]).chunk(2)
        return {"first": first, "second": second}

    def load_state_dict(self, site: Site, saved: Tensors) -> dict[str, Tensor]:
        return {"v": torch.cat([saved["first"], saved["second"]]) / 2}


def test_custom_state_dict(blocks: Make, tmp_path: Path, refused: Refused) -> None:
    """A variant's own form of saving is what the file holds, and comes back whole.

    What is missing or extra is still named.
    """
    model = blocks()
    adapter = ll.attach(model, Packed())
    ones(adapter, 3.0)
    again = reloaded(adapter, blocks(), tmp_path / "a")
    assert set(adapter.state_dict()) == {
        f"{path}.{name}" for path in adapter.sites for name in ("first", "second")
    }
    for (name, p), (_, other) in zip(
        adapter.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(p, other), name
    again.load_state_dict({name: 2 * value for name, value in adapter.state_dict().items()})
    assert {float(p.detach().mean()) for p in again.parameters()} == {6.0}
    state = adapter.state_dict()
    state["blocks.0.up.third"] = torch.zeros(2)
    del state["blocks.1.up.first"]
    tensors = ("blocks.0.up.third", "blocks.1.up.*")
    with refused(model, ll.AdapterFileError, ("'second'", "'first'"), tensors=tensors):
        adapter.load_state_dict(state)


def test_variant_is_one_although_some_layers_have_other_fields(
    blocks: Make, tmp_path: Path, refused: Refused
) -> None:
    """Overrides do not make a recipe of one variant; `sites` has the fields of each layer.

    That holds after loading too. A recipe of several variants has no single one.
    """
    adapter = ll.attach(blocks(), Plain(r=7), overrides={"up": {"r": 8}})
    assert adapter.variant == Plain(r=7)
    again = reloaded(adapter, blocks(), tmp_path / "a")
    assert again.variant.name == "plain"
    assert again.sites == adapter.sites
    several = ll.attach(model := blocks(), {"up": Plain(), "down": Squared()})
    several.save(tmp_path / "b")
    with refused(model, ll.AdapterError, ("sites",)):
        several.variant  # noqa: B018
    again = ll.load(fresh := blocks(), tmp_path / "b", variant=(Plain, Squared))
    with refused(fresh, ll.AdapterError, ("sites",)):
        again.variant  # noqa: B018
    assert again.sites == several.sites


class Old(Base, name="grown"):
    """The variant as it was."""


class New(Base, name="grown"):
    """The variant as it is: r is now called size, v is stored as w, twice as large."""

    format: ClassVar[int] = 3
    r: int = 0
    size: int = 1

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"w": TensorSpec((site.d_out,))}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (t["w"] / 2).expand_as(y)

    @classmethod
    def upgrade(
        cls, fields: dict[str, Any], tensors: dict[str, Tensor], from_format: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if from_format != 1:
            return super().upgrade(fields, tensors, from_format)
        return {"size": fields["r"]}, {"w": 2 * tensors["v"]}


def test_files_of_an_older_format_are_upgraded(
    blocks: Make, tmp_path: Path, refused: Refused
) -> None:
    """An old file loads into the new class, site by site, and computes the same."""
    model = blocks()
    adapter = ll.attach(model, Old(r=7), overrides={"down": {"r": 8}})
    ones(adapter)
    adapter.save(tmp_path / "old")
    fresh = blocks()
    new = ll.load(fresh, tmp_path / "old", variant=New)
    assert {path: v.size for path, v in new.sites.items()} == {  # type: ignore[attr-defined]
        path: 8 if "down" in path else 7 for path in adapter.sites
    }
    x = torch.randn(3, 8)
    torch.testing.assert_close(fresh(x), model(x))
    new.save(tmp_path / "new")
    configurations = fileformat.read(tmp_path / "new")[0].configurations
    assert [each.variant_format for each in configurations] == [3, 3]
    assert ll.load(blocks(), tmp_path / "new", variant=New).sites == new.sites
    says = ("format 3", "'grown'", "up to 1")
    fresh = blocks()
    with refused(fresh, ll.AdapterFileError, says, path=str(tmp_path / "new")):
        ll.load(fresh, tmp_path / "new", variant=Old)


def test_a_format_without_upgrade_says_so(
    blocks: Make, tmp_path: Path, refused: Refused, rewrite: Callable[..., None]
) -> None:
    """A variant that cannot read an old format says which it reads."""
    ll.attach(blocks(), New()).save(tmp_path / "a")
    rewrite(tmp_path / "a", lambda _, header: header["configurations"][0].update(variant_format=2))
    fresh = blocks()
    says = ("'grown'", "format 2 to 3")
    with refused(fresh, ll.AdapterFileError, says, path=str(tmp_path / "a")):
        ll.load(fresh, tmp_path / "a", variant=New)


class Mixed(Base, name="mixed"):
    """Tensors in dtypes of their own."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            "double": TensorSpec((2,), dtype=torch.float64),
            "v": TensorSpec((site.d_out,)),
            "index": TensorSpec((2,), trainable=False, dtype=torch.int64),
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_survive_a_file(blocks: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    """attach(dtype=) is that of the trainable tensors without one of their own.

    A file keeps each; load(dtype=) changes it.
    """
    adapter = ll.attach(blocks(), Mixed(), dtype=dtype)
    again = reloaded(adapter, blocks(), tmp_path / "a")
    expected = {"double": torch.float64, "v": dtype, "index": torch.int64}
    for name, value in again.state_dict().items():
        assert value.dtype == expected[name.rpartition(".")[2]]
    other = ll.load(blocks(), tmp_path / "a", variant=Mixed, dtype=torch.float16)
    assert {value.dtype for value in other.state_dict().values()} == {
        torch.float64,
        torch.float16,
        torch.int64,
    }


class Frozen(Base, name="frozen_only"):
    """Nothing to train."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,), trainable=False)}


def test_a_variant_without_trainable_tensors(blocks: Make, tmp_path: Path) -> None:
    """It can be attached, described and saved like any other."""
    adapter = ll.attach(blocks(), Frozen())
    assert (adapter.num_parameters, adapter.penalty().item(), adapter.param_groups()) == (0, 0, [])
    assert "0 trainable, 40 frozen" in repr(adapter)
    assert reloaded(adapter, blocks(), tmp_path / "a").sites == adapter.sites


# --- several adapters


def test_several_adapters_add_up_in_any_order(blocks: Make) -> None:
    """Bitwise the same whatever the order of attachment.

    Detaching one leaves the others as they were.
    """
    x = torch.randn(5, 8)
    outputs = []
    for order in permutations(
        [("a", Turning(), 0.7), ("b", Plain(), 1.0), ("c", Trained(), -2.0), ("d", Plain(), 0.3)]
    ):
        model = blocks()
        for name, variant, scale in order:
            adapter = ll.attach(model, variant, name=name)
            rng = torch.Generator().manual_seed(ord(name))
            with torch.no_grad():
                for p in adapter.parameters():
                    p.copy_(torch.randn(p.shape, generator=rng))
            adapter.scale = scale
        outputs.append(model(x))
        ll.detach(model, "b")
        assert sorted(ll.adapters(model)) == ["a", "c", "d"]
        without = model(x)
        with ExitStack() as stack:
            for adapter in ll.adapters(model).values():
                stack.enter_context(adapter.disabled())
            assert torch.equal(model(x), blocks()(x))
        assert torch.equal(model(x), without)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert not torch.equal(outputs[0], without)


def test_detach_restores_requires_grad_and_users_hooks(blocks: Make, untouched: Any) -> None:
    """Parameters that did not require a gradient before do not after.

    The user's own hooks stay, and see the adapted y.
    """
    model = blocks()
    model.stem.requires_grad_(False)
    model.blocks[1].up.bias.requires_grad_(False)
    seen = []
    layer = model.blocks[0].up
    layer.register_forward_hook(lambda _m, _args, y: seen.append(y))
    x = torch.randn(2, 8)
    base = model.blocks[0].up(x).detach()
    with untouched(model):
        first = ll.attach(model, Plain(), name="first")
        second = ll.attach(model, Plain(), name="second")
        late = layer.register_forward_hook(lambda _m, _args, y: seen.append(y))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"{path}.lora_{name}_v" for path in first.sites for name in ("first", "second")
        ]
        ones(first)
        seen.clear()
        layer(x)
        assert len(seen) == 2
        assert all(torch.equal(y, base + 1) for y in seen)
        late.remove()
        first.detach()
        assert all(
            p.requires_grad == n.endswith("lora_second_v") for n, p in model.named_parameters()
        )
        second.detach()


def test_start_values_depend_on_seed_names_and_path_alone(blocks: Make) -> None:
    """On the seed, the adapter's name, the layer's path and the tensor's name.

    Not on the global random state, the order of attachment, or other sites. The default name adds
    nothing, so that a run from before the name counted can be repeated.
    """
    adapters = []
    for global_seed, arguments in [
        (0, {}),
        (1, {"targets": "down"}),
        (2, {"seed": 3}),
        (3, {"name": "other"}),
    ]:
        model = blocks()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        adapters.append(ll.attach(model, Turning(), **arguments).state_dict())  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), state)
    everywhere, some, reseeded, renamed = adapters
    assert all(torch.equal(everywhere[name], value) for name, value in some.items())
    assert not any(torch.equal(everywhere[name], value) for name, value in reseeded.items())
    assert not any(torch.equal(everywhere[name], value) for name, value in renamed.items())
    assert not torch.equal(everywhere["blocks.0.up.k"], everywhere["blocks.1.up.k"])
    digest = hashlib.sha256(b"0/blocks.0.up/k").digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    assert torch.equal(everywhere["blocks.0.up.k"], torch.rand(8, generator=rng))


def test_stored_tensors_have_the_strides_of_loaded_ones(blocks: Make, tmp_path: Path) -> None:
    """A column taken from a transposed matrix counts as contiguous whatever its strides; products
    over it would differ in the last bit from those over what a file gives back.
    """

    class Column(Plain, name="column"):
        def tensors(self, site: Site) -> dict[str, TensorSpec]:
            return {"v": TensorSpec((site.d_out, 1))}

        def init(
            self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
        ) -> dict[str, Tensor]:
            return {"v": torch.zeros(1, site.d_out).T}

    model, again = blocks(), blocks()
    ll.attach(model, Column()).save(tmp_path / "file")
    loaded = dict(ll.load(again, tmp_path / "file", variant=Column).named_parameters())
    for name, stored in ll.adapters(model)["default"].named_parameters():
        assert stored.stride() == loaded[name].stride() == (1, 1)


# --- variants written anywhere


def test_a_variant_of_a_notebook(tmp_path: Path) -> None:
    """A class defined in __main__ works without registration: attach an instance, load by variant=.

    By name it is unknown.
    """
    script = f"""
import torch, lora_lite as ll
from torch import nn

class Mine(ll.Variant, name="mine"):
    def tensors(self, site): return {{"v": ll.TensorSpec((site.d_out,))}}
    def init(self, site, derived, statistics, rng):
        return {{"v": torch.randn(site.d_out, generator=rng("v"))}}
    def delta_output(self, site, t, x, y): return t["v"].expand_as(y)

make = lambda: nn.ModuleList([nn.Linear(3, 3)])
adapter = ll.attach(make(), Mine())
adapter.save({str(tmp_path / "a")!r})
again = ll.load(make(), {str(tmp_path / "a")!r}, variant=Mine, check_base=False)
assert torch.equal(*(next(a.parameters()) for a in (adapter, again)))
try:
    ll.load(make(), {str(tmp_path / "a")!r})
except ll.UnknownVariantError as error:
    print(error.plugin)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "mine"


T = TypeVar("T")


@pytest.mark.parametrize(
    ("field", "default", "says"),
    [
        ("targets", "x", ("'targets'", "attach()")),
        ("seed", 0, ("'seed'", "attach()")),
        ("prepare", False, ("'prepare'", "Variant.prepare")),
        ("copy", False, ("'copy'", "Variant.copy")),
        ("identity", "x", ("'identity'", "Variant.identity")),
    ],
)
def test_fields_that_shadow(
    refused: Refused, field: str, default: Any, says: tuple[str, ...]
) -> None:
    """A field by the name of a lifecycle method or of an argument of attach is an error.

    It is found when the class is made.
    """
    namespace = {
        "__module__": __name__,
        "__qualname__": "Bad",
        "__annotations__": {field: type(default)},
        field: default,
    }
    with refused(None, VariantDefinitionError, says, class_name="Bad"):
        type(Variant)("Bad", (Variant,), namespace, name="bad")


def test_classes_that_cannot_be_variants(refused: Refused) -> None:
    """Generic classes do not pickle; names are lower_snake_case.

    Specs have dimensions, and derived ones are frozen.
    """
    with refused(None, VariantDefinitionError, ("Boxed", "generic")):

        class Boxed(Variant, Generic[T], name="boxed"):
            pass

    with refused(None, VariantDefinitionError, ("name='Bad-Name'", "lower_snake_case")):

        class Bad(Variant, name="Bad-Name"):
            pass

    for shape in ((), (0,), (2, -1), (2.0,)):
        with refused(None, VariantDefinitionError, (f"shape={shape}", "positive")):
            TensorSpec(shape)  # type: ignore[arg-type]
    with refused(None, VariantDefinitionError, ("derived", "trainable=False")):
        TensorSpec((2,), derived=True)


def test_a_class_without_name(blocks: Make, refused: Refused) -> None:
    """A base class of a family has no name and cannot be attached; its subclasses can."""
    model = blocks()
    with refused(model, ll.FieldError, ("Base has no name",)):
        ll.attach(model, Base())


class Wide(Base, name="wide"):
    """Gives a delta of another shape than y."""

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["v"]


def test_a_delta_of_another_shape_is_named(blocks: Make, refused: Refused) -> None:
    """Broadcasting would hide a mistake: the delta's shape and dtype are checked."""
    model = blocks()
    ll.attach(model, Wide())
    says = ("delta_output", "float32[12]", "float32[3, 12]")
    with refused(None, VariantContractError, says, variant="wide"):
        model(torch.randn(3, 8))


@pytest.mark.parametrize("frozen", [False, True])
def test_prepare_computes_as_declared_under_autocast(blocks: Make, frozen: bool) -> None:
    """Autocast does not make bfloat16 of what a TensorSpec wants computed in float32.

    Neither before nor under frozen().
    """
    model = blocks()
    ones(adapter := ll.attach(model, Squared()))
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.no_grad(),
        adapter.frozen() if frozen else nullcontext(),
    ):
        model(torch.randn(3, 8))


@pytest.mark.parametrize("scale", [0.1, -3, 1e-320, sys.float_info.max])
def test_any_scale_survives_the_file(blocks: Make, tmp_path: Path, scale: float) -> None:
    """Every finite number, exactly: what could be saved can be loaded."""
    (adapter := ll.attach(blocks(), Plain())).scale = scale
    assert reloaded(adapter, blocks(), tmp_path / "a").scale == scale


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, "1", None, True])
def test_a_scale_is_a_finite_number(blocks: Make, refused: Refused, scale: Any) -> None:
    """Anything else is refused, and the adapter keeps the scale that it has."""
    adapter = ll.attach(model := blocks(), Plain())
    adapter.scale = 2
    with refused(model, ll.AdapterError, (f"scale={scale!r}",)):
        adapter.scale = scale
    assert adapter.scale == 2
