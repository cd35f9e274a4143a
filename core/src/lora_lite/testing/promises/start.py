"""At attach: what is put on a layer, and with which values."""

from __future__ import annotations

import gc
import math
import random
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite.testing.case import TARGETS, Case
from lora_lite.testing.compare import all_same, close, is_close, same
from lora_lite.testing.promise import promise
from lora_lite.variant import TensorSpec, Variant


@promise(examples=15)
def start_matches_identity(case: Case) -> None:
    """A fresh adapter changes nothing: not a bit where `identity` is "exact", nothing beyond rounding where it is "rounding".

    Training starts from the base model. Usually broken by a start value that is not zero, by a factor that turns an exact zero
    into rounding (then say "rounding"), or by dropout that acts on the sum instead of on a zero.
    """
    model, x = case.model(), case.inputs(2, 3)
    with torch.no_grad():
        before = model(x)
        case.attach(model)
        for training in (False, True):
            after = model.train(training)(x)
            if case.variant.identity == "exact":
                same(after, before, "a fresh adapter with identity 'exact'")
            elif case.variant.identity == "rounding":
                close(after, before, "a fresh adapter with identity 'rounding'")


@promise(examples=15)
def start_is_not_better_than_declared(case: Case) -> None:
    """Where `identity` is "none", a fresh adapter does change the output, beyond rounding.

    "none" excuses a variant from starting as the base; one that could keep that promise must make it. Usually broken by an
    `identity` that does not look at the fields it depends on.
    """
    if case.variant.identity == "none":
        case = case.but(dtype=torch.float64)
        model, x = case.model(), case.inputs(2, 3)
        with torch.no_grad():
            before = model(x)
            case.attach(model, dtype=torch.float64)
            assert not is_close(model(x), before), (
                f"{case.variant} declares identity 'none', yet a fresh adapter changes nothing; declare 'exact' or 'rounding' "
                "for these fields"
            )


@promise(examples=12, waivable=False)
def only_declared_tensors_appear(case: Case) -> None:
    """A site gets the tensors that `tensors` declares, under their names, with their shapes, dtypes and flags; nothing else
    appears anywhere on the model, not even after a forward, a backward and a projection.

    What is not declared is not saved, moved, counted or removed. Usually broken by a cache or a buffer that a delta keeps on
    a module, or by a tensor that is declared trainable and made otherwise.
    """
    model = case.model()
    before = _names(model)
    adapter = case.attach(model, name="mine")
    expected = {}
    for path, variant in adapter.sites.items():
        site = case.sites(model)[path]
        for name, spec in variant.tensors(site).items():
            expected[f"{path}.lora_mine_{name}"] = (
                spec.shape,
                _stored_dtype(spec, case.dtype),
                spec.trainable,
            )
    found = {
        name: (tuple(p.shape), p.dtype, p.requires_grad)
        for name, p in model.named_parameters()
        if ".lora_mine_" in name
    }
    assert found == expected, f"on the model: {found}; declared: {expected}"
    model(case.inputs(2, 3)).float().square().mean().backward()
    adapter.project()
    appeared = _names(model) - before - set(expected)
    assert not appeared, f"undeclared: {sorted(appeared)}"


@promise(examples=10)
def parameters_are_as_counted(case: Case) -> None:
    """The trainable numbers that the adapter and `plan` tell are those that `tensors` declares and the model holds, and
    `plan` tells them without a weight, from a model on the meta device.

    Methods are compared at equal parameters. Usually broken by shapes that depend on weights or data, by parameters that are
    shared or frozen after all, or by `tensors` that reads the module.
    """
    model = case.model()
    adapter = case.attach(model)
    sites = case.sites(model)
    declared = sum(
        math.prod(spec.shape)
        for path, variant in adapter.sites.items()
        for spec in variant.tensors(sites[path]).values()
        if spec.trainable
    )
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.num_parameters == counted == declared > 0, (
        f"the adapter tells {adapter.num_parameters} parameters, the model holds {counted}, tensors() declares {declared}"
    )
    if type(case.variant).specialize is Variant.specialize:
        planned, empty = ll.plan(model, case.variant, targets=TARGETS), case.plan()
        told = [(p.parameters, p.macs_per_token, p.macs_per_forward) for p in (planned, empty)]
        told.append((adapter.num_parameters, adapter.macs_per_token, adapter.macs_per_forward))
        assert len(set(told)) == 1, (
            f"(parameters, MACs a token, MACs a forward) by plan, plan on meta, adapter: {told}"
        )


@promise(examples=8)
def start_depends_on_seed_path_and_name_alone(case: Case) -> None:
    """The same seed gives the same start values, bit for bit: whatever the global random state, the order of attachment, the
    other sites and the name of the adapter. Where `init` draws at all, another seed gives others.

    Processes of one run must agree, and a run must be repeatable. Usually broken by torch.randn without `generator=rng(...)`,
    by one generator that is shared between tensors, or by a cache from an earlier site.
    """
    torch.manual_seed(1)
    first = case.attach(case.model())
    torch.manual_seed(2)
    model = case.model()
    parts = [
        case.attach(model, name=name, layers=block) for name, block in (("one", 1), ("zero", 0))
    ]
    state, again = (
        first.state_dict(),
        {k: v for part in parts for k, v in part.state_dict().items()},
    )
    sites = {path: variant for part in parts for path, variant in part.sites.items()}
    alike = {k: v for k, v in state.items() if sites.get(_path(k)) == first.sites[_path(k)]}
    all_same({k: v for k, v in again.items() if k in alike}, alike, "start values of the same seed")
    drawn = _drawn(case)
    if drawn:
        other = case.attach(case.model(), seed=case.seed + 1).state_dict()
        unmoved = other.keys() == state.keys() and all(
            torch.equal(other[k], v) for k, v in state.items()
        )
        assert not unmoved, (
            f"init draws {sorted(drawn)}, yet seeds {case.seed} and {case.seed + 1} start the same"
        )


@promise(examples=6)
def attach_leaves_the_random_state(case: Case) -> None:
    """Attaching draws nothing from the global random states of torch and Python.

    Else the rest of a training run depends on whether and when an adapter was attached. Usually broken by torch.randn,
    nn.init or nn.Linear inside `init` or `derive`, which draw from the global state.
    """
    model = case.model()
    before, python_before = torch.get_rng_state(), random.getstate()
    case.attach(model)
    same(torch.get_rng_state(), before, "torch's global random state after attach")
    assert random.getstate() == python_before, "attach drew from Python's global random state"


@promise(examples=8)
def derived_tensors_come_again(case: Case) -> None:
    """What `derive` computes from the base, it computes again: bit for bit from the same weights, up to rounding from a copy
    of them in another layer, from weights that differ in the last bits, and where a decomposition gives its vectors with
    other signs, as another machine's may. Without data or random draws.

    A small adapter file leaves these tensors out. Usually broken by singular vectors without a fixed sign (see
    `lora_lite.top_r_svd`), by a randomised decomposition without a fixed start, or by a cache.
    """
    case = case.but(dtype=torch.float64)
    model, twin, nudged = case.model(), case.but(kind="Linear").model(), case.model()
    twins, noise = case.sites(twin), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, site in case.sites(model).items():
            twins[path].weight().copy_(site.weight())
        for parameter in nudged.parameters():
            parameter.mul_(1 + 1e-12 * torch.randn(parameter.shape, generator=noise))
    for path, site in case.sites(model).items():
        derived = case.variant.derive(site)
        torch.manual_seed(3)
        all_same(case.variant.derive(site), derived, "derive, called again")
        for what, other in (("on a copy", twin), ("on weights that differ by 1e-12", nudged)):
            for name, value in case.variant.derive(case.sites(other)[path]).items():
                close(value, derived[name], f"{name}, derived {what}", tolerance=1e-6)
        for first in (1, -1):
            with OtherSigns(first):
                other_signs = case.variant.derive(site)
            for name, value in other_signs.items():
                close(
                    value,
                    derived[name],
                    f"{name}, derived with other signs of a decomposition",
                    tolerance=1e-6,
                )


@promise(examples=2)
def adapter_is_freed(case: Case) -> None:
    """After detaching, nothing holds the adapter's tensors; and nothing holds a model with an adapter on it.

    A loop over variants must not fill the memory. Usually broken by a module-level cache, a closure or a cached property that
    keeps a site, a module or a tensor.
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


class OtherSigns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns every second vector of a decomposition round, beginning with the `first` or the next: A = (U D) S (V D)ᵀ holds for
    any D of signs.
    """

    def __init__(self, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first = first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation; the vectors of svd and eigh, and of qr with its rows of R, get other signs."""
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_linalg_svd":
            u, s, vh = found
            return self._turned(u), s, self._turned(vh.mT).mT
        if name == "_linalg_eigh":
            values, vectors = found
            return values, self._turned(vectors)
        if name == "linalg_qr":
            q, r = found
            return self._turned(q), self._turned(r.mT).mT
        return found

    def _turned(self, vectors: Tensor) -> Tensor:
        vectors = vectors.clone()
        vectors[..., ::2] *= self.first
        vectors[..., 1::2] *= -self.first
        return vectors


def _names(model: torch.nn.Module) -> set[str]:
    """Parameters, buffers and attributes of every module, hooks aside."""
    found = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        found |= {
            f"{path}.{attribute} (attribute)"
            for attribute in module.__dict__
            if attribute != "_lora_lite"
        }
    return found


def _stored_dtype(spec: TensorSpec, base: torch.dtype) -> torch.dtype:
    return spec.dtype or (torch.float32 if spec.trainable else base)


def _path(key: str) -> str:
    return key.rpartition(".")[0]


def _drawn(case: Case) -> set[str]:
    """The tensors for which `init` asks for a generator; none where it needs calibration data."""
    site = case.site(case.model())
    if case.variant.observe(site) is not None:
        return set()
    asked: set[str] = set()

    def rng(tensor: str) -> torch.Generator:
        asked.add(tensor)
        return torch.Generator().manual_seed(0)

    with torch.no_grad():
        case.variant.init(site, case.variant.derive(site), {}, rng)
    return asked
