"""Calibration: one streamed pass, padding dropped, the model as it was, whatever is attached."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite.author import Observer, Rng, Site, Tensors, TensorSpec, Variant
from torch import Tensor, nn
from torch.utils.data import DataLoader

Make = Callable[..., nn.Module]


class Sums:
    """The sums of x and y, and how many rows there were."""

    def __init__(self, site: Site) -> None:
        self.x, self.y, self.rows = torch.zeros(site.d_in), torch.zeros(site.d_out), 0
        self.kept: list[weakref.ref[Tensor]] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        assert x.ndim == y.ndim == 2
        assert not x.requires_grad
        assert not torch.is_grad_enabled()
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.rows += len(x)
        assert len(x) == len(y)
        self.kept.append(weakref.ref(x))

    def result(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y, "rows": torch.tensor(self.rows)}


SEEN: dict[str, Tensors] = {}


class Mean(Variant, name="mean"):
    """Starts from the mean of the layer's output, which a test can read."""

    def observe(self, site: Site) -> Observer | None:
        return Sums(site)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"m": TensorSpec((site.d_out,)), "c": TensorSpec((1,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        SEEN[site.path] = statistics
        return {"m": statistics["y"] / statistics["rows"], "c": torch.ones(1)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (t["m"] * t["c"]).expand_as(y)


def attach(model: nn.Module, calibration: Any, **arguments: Any) -> dict[str, Tensors]:
    """The statistics that every site was given."""
    SEEN.clear()
    ll.attach(model, Mean(), calibration=calibration, **arguments)
    return dict(SEEN)


def test_statistics_are_those_of_the_base(blocks: Make) -> None:
    """Every site's observer sees the rows of x and of W x + b of all batches."""
    batches = [torch.randn(3, 5, 8), torch.randn(2, 8)]
    seen = attach(blocks(), batches)
    model = blocks()
    x = model.stem(torch.cat([b.reshape(-1, 8) for b in batches]))
    torch.testing.assert_close(seen["blocks.0.up"]["x"], x.sum(0).detach())
    torch.testing.assert_close(seen["blocks.0.up"]["y"], model.blocks[0].up(x).sum(0).detach())
    assert {int(s["rows"]) for s in seen.values()} == {17}


def test_padding_is_dropped(blocks: Make) -> None:
    """Rows whose attention_mask is 0 do not count, whatever they hold.

    A mask of heads, queries and keys that hides nothing keeps every row.
    """
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    garbage = torch.where(mask[..., None] == 1, x, 1e6)
    seen = attach(blocks(), [{"x": garbage, "attention_mask": mask}])
    plain = attach(blocks(), [x[mask.bool()]])
    for path, statistics in plain.items():
        for name, value in statistics.items():
            torch.testing.assert_close(seen[path][name], value)
    unmasked = attach(blocks(), [{"x": x, "attention_mask": torch.ones(2, 1, 4, 4)}, {"x": x}])
    assert int(unmasked["blocks.0.up"]["rows"]) == 16


def test_padding_is_dropped_where_tokens_are_flat() -> None:
    """Layers that are called with (batch · tokens, d) activations drop the same rows."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.layers[0](x.reshape(-1, 8))
            return out

    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    seen = attach(Flat(), [{"x": torch.randn(2, 3, 8), "attention_mask": mask}])
    assert int(seen["layers.0"]["rows"]) == 4


def test_every_form_of_batch(blocks: Make) -> None:
    """Mappings, tuples, lists, tensors, a DataLoader, a generator: one and the same."""
    x = torch.randn(4, 8)

    def generate() -> Iterator[Tensor]:
        yield x[:2]
        yield x[2:]

    forms = [
        [{"x": x}],
        [(x,)],
        [[x]],
        [x],
        DataLoader(x, batch_size=2),
        generate(),
        ({"x": row[None]} for row in x),
    ]  # type: ignore[arg-type]
    for form in forms:
        seen = attach(blocks(), form)
        assert int(seen["blocks.1.down"]["rows"]) == 4
        torch.testing.assert_close(seen["blocks.0.up"]["x"], blocks().stem(x).sum(0).detach())


def test_nothing_is_kept_of_a_batch(blocks: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, one batch at a time: the activations of a batch are gone when the next is drawn."""
    observers: list[Sums] = []
    monkeypatch.setattr(
        Mean, "observe", lambda _, site: observers.append(Sums(site)) or observers[-1]
    )
    drawn = []

    def stream() -> Iterator[Tensor]:
        for number in range(5):
            gc.collect()
            drawn.append((number, sum(ref() is not None for o in observers for ref in o.kept)))
            yield torch.randn(6, 8)

    attach(blocks(), stream())
    assert drawn == [(number, 0) for number in range(5)]
    assert all(len(o.kept) == 5 for o in observers)


def test_order_of_attachment_does_not_matter(blocks: Make) -> None:
    """Other adapters are off during calibration: the statistics are the base's."""
    x = [torch.randn(6, 8)]
    alone = attach(blocks(), x)
    model = blocks()
    first = ll.attach(model, Mean(), name="first", calibration=x)
    after = attach(model, x)
    for path, statistics in alone.items():
        for name, value in statistics.items():
            assert torch.equal(after[path][name], value), (path, name)
    assert "disabled" not in repr(first)


def test_training_flags_and_random_state(blocks: Make) -> None:
    """The pass runs in eval mode, and leaves every module's own flag and every hook as it was."""
    model = blocks()
    model.dropout = nn.Dropout(0.5)
    model.train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    modes = []
    model.stem.register_forward_hook(lambda module, *_: modes.append(module.training))
    ll.attach(model, Mean(), calibration=[torch.randn(6, 8)]).detach()
    assert modes == [False]
    assert [module.training for module in model.modules()] == flags
    assert len(model.stem._forward_hooks) == 1
