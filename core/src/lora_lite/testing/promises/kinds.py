"""Layers of other kinds than linear ones: an embedding, a convolution, the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing.case import Case, move
from lora_lite.testing.compare import close
from lora_lite.testing.promise import promise

EXPERTS = 3
# How far a convolution's kernel reaches, if that divides d_in.
KERNELS = (3, 2)

# What a layer gives for rows that it never sees as rows, and these rows.
Made = tuple[nn.Module, Callable[[nn.Module], Tensor], Tensor]


@promise(examples=4)
def other_kinds_compute_the_same(case: Case) -> None:
    """On an embedding, a convolution and the experts of a mixture, a variant that fits them
    computes what it computes on the linear layer with the same weight and the same tensors.

    Variants that replace parameters, or need calibration data, are not asked. Usually broken by a
    method that reads the module instead of asking `site`, or that takes x for more than something
    to multiply.
    """
    if case.variant.replaces_weights:
        return
    case = case.but(dtype=torch.float64, kind="Linear")
    for make in (_embedding, _convolution):
        _compare_one(case, make)
    _compare_experts(case)


def _compare_one(case: Case, make: Callable[[Case, nn.Linear], Made]) -> None:
    alone = _linear(case, case.seed)
    module, call, rows = make(case, alone)
    twin = nn.Linear(case.d_in, case.d_out, bias=module._parameters.get("bias") is not None)
    twin.load_state_dict(alone.state_dict(), strict=False)
    model, other = _holding(twin.double()), _holding(module.double())
    if not _fits(case, model) or not _fits(case, other):
        return
    adapter = _moved(case, model, 1)
    _attached(case, other).load_state_dict(adapter.state_dict())
    with torch.no_grad():
        expected, found = model["layer"](rows), call(other["layer"])
    close(found, expected, f"on {type(module).__name__}, against the linear layer")


def _compare_experts(case: Case) -> None:
    layers = [_linear(case, case.seed + expert) for expert in range(EXPERTS)]
    models = [_holding(layer.double()) for layer in layers]
    other = _holding(Experts(torch.stack([layer.weight.detach() for layer in layers])))
    if not all(_fits(case, model) for model in (*models, other)):
        return
    adapters = [_moved(case, model, expert) for expert, model in enumerate(models)]
    states = [adapter.state_dict() for adapter in adapters]
    stacked = {
        key.replace("layer.", "layer.down_proj."): torch.stack([state[key] for state in states])
        for key in states[0]
    }
    _attached(case, other).load_state_dict(stacked)
    x = case.inputs(EXPERTS, 4, seed=2)
    with torch.no_grad():
        expected = torch.stack([model["layer"](x[e]) for e, model in enumerate(models)])
        close(other["layer"](x), expected, "on the experts of a mixture, against linear layers")


class Experts(nn.Module):
    """Experts in one parameter, (experts, d_out, d_in); those of x go to one each."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.is_transposed = False
        self.down_proj = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        """(experts, rows, d_in) to (experts, rows, d_out)."""
        rows = [nn.functional.linear(x[e], self.down_proj[e]) for e in range(len(x))]
        return torch.stack(rows)


def _linear(case: Case, seed: int) -> nn.Linear:
    """The first layer of the case's model, with the weights of a seed, without a bias."""
    layer = case.but(seed=seed).model().layer
    plain = nn.Linear(case.d_in, case.d_out, bias=False)
    plain.load_state_dict({"weight": layer.state_dict()["weight"]})
    return plain


def _embedding(case: Case, linear: nn.Linear) -> Made:
    module = nn.Embedding(case.d_in, case.d_out)
    module.load_state_dict({"weight": linear.weight.detach().T})
    ids = torch.arange(case.d_in)
    return module, lambda layer: layer(ids), nn.functional.one_hot(ids).double()


def _convolution(case: Case, linear: nn.Linear) -> Made:
    kernel = next((size for size in KERNELS if case.d_in % size == 0), 1)
    channels = case.d_in // kernel
    module = nn.Conv1d(channels, case.d_out, kernel, bias=False)
    module.load_state_dict({"weight": linear.weight.detach().reshape(-1, channels, kernel)})
    rng = torch.Generator().manual_seed(case.seed)
    x = torch.randn(2, channels, kernel + 3, generator=rng).double()
    patches = x.unfold(2, kernel, 1).transpose(1, 2).flatten(2)
    return module, lambda layer: layer(x).transpose(1, 2), patches


def _holding(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layer": layer}).eval()


def _fits(case: Case, model: nn.Module) -> bool:
    """Whether the variant goes there, without calibration data."""
    try:
        placements = ll.plan(model, case.variant, targets="layer").placements
    except ll.TargetError:
        return False
    return not any(placement.variant.observe(placement.site) for placement in placements)


def _attached(case: Case, model: nn.Module) -> ll.Adapter:
    return ll.attach(model, case.variant, targets="layer", dtype=torch.float64)


def _moved(case: Case, model: nn.Module, seed: int) -> ll.Adapter:
    adapter = _attached(case, model)
    move(adapter, 0.1, seed)
    return adapter
