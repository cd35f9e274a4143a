"""Calibration: what an observer makes of the batches that go by."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_lite.testing.case import Case
from lora_lite.testing.compare import same
from lora_lite.testing.promise import promise
from lora_lite.variant import Observer

ROWS = 64
FEW, MANY = 8, 40
TRIES = 4


@promise(examples=6)
def every_batch_of_calibration_counts(case: Case) -> None:
    """Where a variant takes calibration data, its statistics depend on every batch, and no batch is written.

    Usually broken by a sum that is set anew with each batch, by a first batch that is taken for all, or by an in-place
    operation on x or y, which are the model's own.
    """
    if not _observes(case):
        return
    for left_out in range(3):
        tries = (_ignored(case, left_out, 3 * attempt) for attempt in range(TRIES))
        assert not all(tries), (
            f"the statistics of three batches are, to the bit, those without batch {left_out}"
        )


@promise(examples=2)
def calibration_keeps_no_batch(case: Case) -> None:
    """The memory of an observer does not grow with the number of batches.

    Calibration data may be a hundred thousand tokens at every layer. Usually broken by a list of activations that is worked
    through in `result`.
    """
    if not _observes(case):
        return
    kept = {number: _bytes_after(case, number) for number in (FEW, MANY)}
    grown, fed = kept[MANY] - kept[FEW], (MANY - FEW) * ROWS * case.d_in * 4
    assert grown < fed / 2, (
        f"after {MANY} batches the observer holds {grown:,} bytes more than after {FEW}; x of the batches between had {fed:,}"
    )


def _observes(case: Case) -> bool:
    return case.variant.observe(case.site(case.model())) is not None


@torch.no_grad()
def _ignored(case: Case, left_out: int, seed: int) -> bool:
    """Whether the statistics of three batches stay the same where one of them, of greater activations, is left out."""
    batches = [case.inputs(ROWS, seed=seed + i) * (3 if i == left_out else 1) for i in range(3)]
    whole = _observed(case, batches).result()
    rest = _observed(case, [batch for i, batch in enumerate(batches) if i != left_out]).result()
    return whole.keys() == rest.keys() and all(
        torch.equal(rest[name], value) for name, value in whole.items()
    )


@torch.no_grad()
def _observed(case: Case, batches: Iterable[Tensor]) -> Observer:
    """The first layer's observer, after these batches."""
    model = case.model()
    observer = case.variant.observe(case.site(model))
    assert observer is not None
    for x in batches:
        y = model.layer(x)
        given = x.clone(), y.clone()
        observer.update(x, y)
        same(x, given[0], "x after update")
        same(y, given[1], "y after update")
    return observer


def _bytes_after(case: Case, number: int) -> int:
    """Bytes of all tensors that are alive after so many batches, before the result is asked for."""
    _observer = _observed(case, (case.inputs(ROWS, seed=seed) for seed in range(number)))
    gc.collect()
    storages = [
        o.untyped_storage()
        for o in gc.get_objects()
        if type(o) is Tensor and o.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
