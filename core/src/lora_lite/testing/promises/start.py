"""At attach: what is put on a layer, and with which values."""

from __future__ import annotations

import gc
import math
import random
import sys
import weakref

import torch

import lora_lite as ll
from lora_lite.author import TensorSpec, Variant
from lora_lite.shared import is_shared
from lora_lite.testing import inside
from lora_lite.testing.case import TARGETS, Case
from lora_lite.testing.compare import all_same, close, is_close, same
from lora_lite.testing.draws import drawn, drawn_from_elsewhere
from lora_lite.testing.inside import DIGEST, attribute
from lora_lite.testing.promise import promise
from lora_lite.testing.settings import settings_stay

IDENTITIES = ("exact", "rounding", "none")


@promise(examples=15, sizes=True)
def start_matches_identity(case: Case) -> None:
    """A fresh adapter changes nothing: not a bit if `identity` is "exact", nothing beyond rounding
    if it is "rounding".

    Training starts from the base model. Usually broken by a start value that is not zero, by a
    factor that turns an exact zero into rounding (then say "rounding"), by a misspelt `identity`,
    or by dropout that acts on the sum instead of on a zero.
    """
    identity = case.variant.identity
    assert identity in IDENTITIES, f"identity is {identity!r}, expected one of {IDENTITIES}"
    model, x = case.model(), case.inputs(2, case.tokens)
    with torch.no_grad():
        before = model(x)
        case.attach(model)
        for training in (False, True):
            after = model.train(training)(x)
            if identity == "exact":
                same(after, before, "a fresh adapter with identity 'exact'")
            elif identity == "rounding":
                close(after, before, "a fresh adapter with identity 'rounding'")


@promise(examples=15)
def start_is_not_better_than_declared(case: Case) -> None:
    """If `identity` is "none", a fresh adapter does change the output, beyond rounding.

    "none" excuses a variant from starting as the base; one that could keep that promise must make
    it. Usually broken by an `identity` that does not look at the fields it depends on.
    """
    if case.variant.identity != "none":
        return
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(2, 3)
    with torch.no_grad():
        before = model(x)
        case.attach(model, dtype=torch.float64)
        assert not is_close(model(x), before), (
            f"{case.variant} declares identity 'none', yet a fresh adapter changes nothing; "
            "declare 'exact' or 'rounding' for these fields"
        )


@promise(examples=12)
def weight_decay_keeps_the_start(case: Case) -> None:
    """Weight decay leaves a fresh adapter where it is: with the decaying tensors halved, it still
    changes nothing, up to rounding.

    Decay pulls a tensor to zero, so zero must stand for the base. Usually broken by a gain, a
    magnitude or an absolute weight that starts at another value than zero: store its offset from
    the start, or say `decay=False`. A variant with identity "none" is not asked.
    """
    if case.variant.identity == "none":
        return
    case = case.but(dtype=torch.float64)
    model, x = case.model(), case.inputs(2, 3)
    with torch.no_grad():
        before = model(x)
        adapter = case.attach(model, dtype=torch.float64)
        decaying = [group for group in adapter.param_groups(1.0) if group["weight_decay"]]
        for group in decaying:
            for parameter in group["params"]:
                parameter.mul_(0.5)
        close(
            model(x), before, "a fresh adapter with its decaying tensors halved, against the base"
        )


@promise(examples=12, waivable=False)
def only_declared_tensors_appear(case: Case) -> None:
    """A layer gets the tensors that `tensors` declares, under their names, with their shapes,
    dtypes and flags, and the core's digest of the fields; nothing else appears anywhere on the
    model, not even after a forward, a backward and a projection.

    What is not declared is not saved, moved, counted or removed. Usually broken by a cache or a
    buffer that a delta keeps on a module, or by a tensor that is declared trainable and made
    otherwise.
    """
    model = case.model()
    before = _names(model)
    adapter = case.attach(model, name="mine")
    expected = {}
    for path, variant in adapter.sites.items():
        site = case.sites(model)[path]
        for name, spec in variant.tensors(site).items():
            dtype = _stored_dtype(spec, case.dtype)
            place = inside.place("mine", path, variant, name, spec)
            expected[place] = (spec.shape, dtype, spec.trainable)
    found = {
        name: (tuple(p.shape), p.dtype, p.requires_grad)
        for name, p in model.named_parameters()
        if f".{name}".rpartition(".")[2].startswith("lora_mine_")
    }
    digest = f"{next(iter(adapter.sites))}.{attribute('mine', DIGEST)}"
    if digest not in expected:
        found.pop(digest, None)
    assert found == expected, f"on the model: {found}; declared: {expected}"
    model(case.inputs(2, 3)).float().square().mean().backward()
    adapter.project()
    appeared = _names(model) - before - {*expected, digest}
    assert not appeared, f"undeclared: {sorted(appeared)}"


@promise(examples=10, sizes=True)
def parameters_are_as_counted(case: Case) -> None:
    """The trainable numbers that the adapter and `plan` report are those that `tensors` declares
    and the model holds, and `plan` reports them without a weight, from a model on the meta device.

    Methods are compared at equal parameters. Usually broken by shapes that depend on weights or
    data, by parameters that are shared or frozen after all, or by `tensors` that reads the module.
    """
    model = case.model()
    adapter = case.attach(model)
    sites = case.sites(model)
    sizes = {
        inside.place("default", path, variant, name, spec): math.prod(spec.shape)
        for path, variant in adapter.sites.items()
        for name, spec in variant.tensors(sites[path]).items()
        if spec.trainable
    }
    declared = sum(sizes.values())
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.num_parameters == counted == declared > 0, (
        f"the adapter reports {adapter.num_parameters} parameters, the model holds {counted}, "
        f"tensors() declares {declared}"
    )
    if type(case.variant).specialize is Variant.specialize:
        plans = ll.plan(model, case.variant, targets=TARGETS), case.plan()
        told = [(p.parameters, p.macs_per_token, p.macs_per_forward) for p in plans]
        told.append((adapter.num_parameters, adapter.macs_per_token, adapter.macs_per_forward))
        assert len(set(told)) == 1, (
            f"(parameters, MACs a token, MACs a forward) by plan, plan on meta, adapter: {told}"
        )


@promise(examples=8)
def start_depends_on_seed_path_and_name_alone(case: Case) -> None:
    """The same seed, name of the adapter, layer and name of the tensor give the same start values,
    bit for bit: whatever the global random state, the order of attachment and the other layers. If
    `init` draws at all, another seed and another name of the adapter give other values, and no two
    trainable tensors of a layer start alike. A trainable tensor is not drawn from any generator but
    `rng`'s.

    Processes of one run must agree, a run must be repeatable, and two adapters that start alike
    would never separate. Usually broken by torch.randn without `generator=rng(...)`, by a generator
    with a seed of its own, by one generator or one name for two tensors, or by a cache from an
    earlier layer.
    """
    torch.manual_seed(1)
    first = case.attach(case.model(), name="mine")
    torch.manual_seed(2)
    model = case.model()
    other = case.attach(model, name="other")
    parts = [case.attach(model, name="mine", layers=1)]
    parts.append(case.attach(case.model(), name="mine", layers=0))
    for part in parts:
        values = part.state_dict()
        expected = {
            key: value
            for key, value in first.state_dict().items()
            if part.sites.get(_path(key)) == first.sites.get(_path(key))
            and (key in values or not is_shared(key))
        }
        found = {key: value for key, value in values.items() if key in expected}
        all_same(found, expected, "start values of the same seed")
    asked_for = drawn(case)
    if asked_for:
        reseeded = case.attach(case.model(), name="mine", seed=case.seed + 1)
        asked = f"init draws {sorted(asked_for)}"
        _start_apart(first, reseeded, f"{asked}, and another seed")
        _start_apart(first, other, f"{asked}, and another name of the adapter")
        _no_twins(first)
    foreign = drawn_from_elsewhere(case)
    assert not foreign, (
        f"init draws {foreign} from a generator of its own, which gives every layer and every "
        "seed the same start; draw with rng(its name)"
    )


@promise(examples=6)
def attach_leaves_the_random_state(case: Case) -> None:
    """Attaching draws nothing from the global random states of torch, numpy and Python, and changes
    no global setting of torch.

    Otherwise the rest of a training run depends on whether and when an adapter was attached.
    Usually broken by torch.randn, nn.init or nn.Linear inside `init` or `derive`, which draw from
    the global state, or by torch.set_default_dtype around a decomposition.
    """
    model = case.model()
    before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = _numpy_state()
    with settings_stay("attach"):
        case.attach(model)
    same(torch.get_rng_state(), before, "torch's global random state after attach")
    assert random.getstate() == python_before, "attach drew from Python's global random state"
    assert _numpy_state() == numpy_before, "attach drew from numpy's global random state"


@promise(examples=2)
def adapter_is_freed(case: Case) -> None:
    """After detaching, nothing holds the adapter's tensors; and nothing holds a model with an
    adapter on it.

    A loop over variants must not fill the memory. Usually broken by a module-level cache, a closure
    or a cached property that keeps a site, a module or a tensor.
    """
    model = case.model()
    adapter = case.trained(model)
    model(case.inputs(2, 3)).float().sum().backward()
    tensors = [weakref.ref(p) for name, p in model.named_parameters() if "lora_" in name]
    adapter.detach()
    gc.collect()
    held = sum(ref() is not None for ref in tensors)
    assert not held, f"{held} of {len(tensors)} tensors of a detached adapter are still held"
    adapter = case.trained(model)
    with torch.no_grad(), adapter.frozen():
        model(case.inputs(2, 3))
    gone = [weakref.ref(module) for module in model.modules()]
    del model, adapter
    gc.collect()
    held = sum(ref() is not None for ref in gone)
    assert not held, (
        f"{held} of {len(gone)} modules of a deleted model with an adapter are still held"
    )


def _names(model: torch.nn.Module) -> set[str]:
    """Parameters, buffers and attributes of every module, hooks aside."""
    found = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        own = (name for name in module.__dict__ if not name.startswith("_lora_lite"))
        found |= {f"{path}.{name} (attribute)" for name in own}
    return found


def _stored_dtype(spec: TensorSpec, base: torch.dtype) -> torch.dtype:
    return spec.dtype or (torch.float32 if spec.trainable else base)


def _path(key: str) -> str:
    return key.rpartition(".")[0]


def _start_apart(first: ll.Adapter, other: ll.Adapter, what: str) -> None:
    one, two = first.state_dict(), other.state_dict()
    alike = one.keys() == two.keys() and all(torch.equal(two[key], one[key]) for key in one)
    assert not alike, f"{what} starts the same"


def _no_twins(adapter: ll.Adapter) -> None:
    """No two trainable tensors of one layer have the same start values, constants aside."""
    seen: dict[tuple[str, tuple[float, ...]], str] = {}
    for key, parameter in adapter.named_parameters():
        value = parameter.detach()
        if value.numel() < 2 or bool((value == value.flatten()[0]).all()):
            continue
        content = _path(key), tuple(value.flatten().tolist())
        assert content not in seen, (
            f"{seen[content]} and {key} start with the same numbers; draw each with rng(its name)"
        )
        seen[content] = key


def _numpy_state() -> str:
    numpy = sys.modules.get("numpy")
    return repr(numpy.random.get_state()) if numpy else ""
