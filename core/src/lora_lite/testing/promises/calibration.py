"""Calibration: what an observer makes of the batches that go by."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.author import GradientObserver, Observer, Site
from lora_lite.testing import inside
from lora_lite.testing.case import Case
from lora_lite.testing.compare import close, finite, same
from lora_lite.testing.promise import promise

ROWS = 64
FEW, MANY = 8, 40
# Batches of two rows: so many that a sum in bfloat16, which has 8 bits, no longer grows.
SMALL_BATCHES = 600
TRIES = 4
# Between start values from the same rows in other batches. A wrong weight is far larger.
REGROUPED = 0.1


@promise(examples=6, sizes=True)
def every_batch_of_calibration_counts(case: Case) -> None:
    """If a variant takes calibration data, its statistics depend on every batch, and on every part
    of a batch; and no batch is written.

    Usually broken by a sum that is set anew with each batch, by a first batch that is taken for
    all, by rows that are left out, or by an in-place operation on x or y, which are the model's
    own.
    """
    if not _observes(case):
        return
    for left_out in range(3):
        tries = (_ignored(case, left_out, 3 * attempt) for attempt in range(TRIES))
        assert not all(tries), (
            f"the statistics of three batches are, to the bit, those without batch {left_out}"
        )
    tries = (_ignores_the_last_rows(case, attempt) for attempt in range(TRIES))
    assert not all(tries), (
        f"the statistics of a batch of {_rows(case)} rows are, to the bit, those without its last "
        "quarter"
    )


@promise(examples=6)
def calibration_counts_rows_not_batches(case: Case) -> None:
    """The start values depend on the rows of the calibration data, not on how they are divided into
    batches.

    The last batch of a data set is smaller than the others. Usually broken by a mean of the
    batches' means, or by a moving average.
    """
    if not _observes(case):
        return
    x = case.inputs(8, 16, seed=90)
    x[0] *= 3  # so that it matters whether this is one batch of two or one sequence of eight
    whole = case.attach(case.model(), calibration=[x])
    parts = case.attach(case.model(), calibration=[x[:1], x[1:]])
    if parts.sites != whole.sites:
        return  # a near tie between layers
    expected = whole.state_dict()
    for name, value in parts.state_dict().items():
        if value.is_floating_point():
            what = f"{name}, from the same rows in other batches"
            close(value, expected[name], what, tolerance=REGROUPED)


@promise(examples=4)
def calibration_takes_any_rows(case: Case) -> None:
    """An input that is always zero gives finite start values or a `CalibrationError`, and each
    layer's observer minds its own layer.

    A network may have dead units. Usually broken by a division by a standard deviation, or by one
    observer that all layers share.
    """
    if not _observes(case):
        return
    model = case.model()
    sites = list(case.sites(model).values())
    observer, other = case.variant.observe(sites[0]), case.variant.observe(sites[1])
    expected = _observed(case, _batches(case)).result()
    assert observer is not None
    assert other is not None
    with torch.no_grad():
        for index, x in enumerate(_batches(case)):
            inside.observe(observer, x, model.layer(x))
            inside.observe(other, 2 * x + index, model.layer(2 * x + index))
        for name, value in observer.result().items():
            what = f"{name}, with another layer's observer at work in between"
            close(value, expected[name], what, tolerance=1e-3)
        dead = [x * (torch.arange(case.d_in) != 1) for x in _batches(case)]
        statistics = _observed(case, dead).result()
        try:
            start = _start(case, sites[0], statistics)
        except ll.CalibrationError:
            return
    for name, value in start.items():
        finite(value, f"the start of {name}, from an input that is always zero")


@promise(examples=1)
def calibration_adds_up_in_half_precision(case: Case) -> None:
    """In a bfloat16 model the statistics are those of the same numbers in float32.

    Usually broken by sums that are kept in the dtype of x: in bfloat16, 256 + 1 is 256.
    """
    if not _observes(case):
        return
    site = case.site(case.model())
    half, full = case.variant.observe(site), case.variant.observe(site)
    assert half is not None
    assert full is not None
    x = case.inputs(2 * SMALL_BATCHES, seed=70).bfloat16()
    with torch.no_grad():
        y = case.model().layer(x.to(case.dtype)).bfloat16()
        for i in range(0, len(x), 2):
            inside.observe(half, x[i : i + 2], y[i : i + 2])
            inside.observe(full, x[i : i + 2].float(), y[i : i + 2].float())
    expected = full.result()
    for name, value in half.result().items():
        what = f"{name}, from {SMALL_BATCHES} batches in bfloat16"
        close(value.float(), expected[name].float(), what, tolerance=REGROUPED)


@promise(examples=2)
def calibration_keeps_no_batch(case: Case) -> None:
    """The memory of an observer does not grow with the number of batches.

    Calibration data may be a hundred thousand tokens at every layer. Usually broken by a list of
    activations that is worked through in `result`.
    """
    if not _observes(case):
        return
    kept = {number: _bytes_after(case, number) for number in (FEW, MANY)}
    grown, fed = kept[MANY] - kept[FEW], (MANY - FEW) * ROWS * case.d_in * 4
    assert grown < fed / 2, (
        f"after {MANY} batches the observer holds {grown:,} bytes more than after {FEW}; x of the "
        f"batches between had {fed:,}"
    )


def _observes(case: Case) -> bool:
    return case.variant.observe(case.site(case.model())) is not None


def _rows(case: Case) -> int:
    return 40 * case.tokens


def _batches(case: Case) -> list[Tensor]:
    return [case.inputs(_rows(case), seed=40 + i) for i in range(3)]


def _start(case: Case, site: Site, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `init` makes of one layer's statistics."""

    def rng(name: str) -> Any:
        return torch.Generator().manual_seed(len(name))

    return case.variant.init(site, case.variant.derive(site), statistics, rng)


@torch.no_grad()
def _ignored(case: Case, left_out: int, seed: int) -> bool:
    """Whether three batches give the same without one of them, which has greater activations."""
    rows = _rows(case)
    batches = [case.inputs(rows, seed=seed + i) * (3 if i == left_out else 1) for i in range(3)]
    rest = [batch for i, batch in enumerate(batches) if i != left_out]
    return _alike(_observed(case, batches).result(), _observed(case, rest).result())


@torch.no_grad()
def _ignores_the_last_rows(case: Case, seed: int) -> bool:
    """Whether the last quarter of a batch, of greater activations, makes no difference."""
    rows = _rows(case)
    x = case.inputs(rows, seed=60 + seed)
    x[3 * rows // 4 :] *= 3
    return _alike(_observed(case, [x]).result(), _observed(case, [x[: 3 * rows // 4]]).result())


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(torch.equal(other[name], value) for name, value in one.items())


@torch.no_grad()
def _observed(case: Case, batches: Iterable[Tensor]) -> Observer | GradientObserver:
    """The first layer's observer, after these batches."""
    model = case.model()
    observer = case.variant.observe(case.site(model))
    assert observer is not None
    for x in batches:
        y = model.layer(x)
        given = x.clone(), y.clone()
        inside.observe(observer, x, y)
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
