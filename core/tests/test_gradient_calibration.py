"""Calibration with gradients: a backward pass that only observers see."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lora_lite as ll
import pytest
import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant
from lora_lite.author import GradientObserver
from torch import Tensor, nn


class Seen:
    """Keeps Σ grad_yᵀ x, the number of rows, and what it was given last."""

    wants_gradients: ClassVar[Literal[True]] = True

    def __init__(self, site: Site) -> None:
        self.total = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        self.rows = 0

    def update(self, x: Tensor, y: Tensor, grad_y: Tensor) -> None:
        assert not any([x.requires_grad, y.requires_grad, torch.is_grad_enabled()])
        self.total += grad_y.double().T @ x.double()
        self.rows += len(x)

    def result(self) -> dict[str, Tensor]:
        return {"G": self.total, "rows": torch.tensor(self.rows)}


class Graded(Variant, name="graded"):
    """Δy = 0 + b, and its statistics kept where the test can see them."""

    seen: ClassVar[dict[str, Tensors]] = {}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"b": TensorSpec((site.d_out,))}

    def observe(self, site: Site) -> GradientObserver:
        return Seen(site)

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        self.seen[site.path] = statistics
        return {"b": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["b"].expand_as(y)


class InPlace(nn.Module):
    """Two layers with activations that write to their outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu_(self.drop(layer(x)).add_(1))
        return x


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def squares(output: Tensor, batch: Tensor) -> Tensor:
    return (output * batch).square().sum()


def expected_gradients(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """By autograd, on a copy that is trained whole."""
    weights = {f"layers.{i}": model.layers[i].weight for i in range(2)}
    model.eval()
    total = sum(squares(model(batch), batch) for batch in batches)
    found = torch.autograd.grad(total, list(weights.values()))
    return dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_autograd(mode: Callable[[], Any]) -> None:
    """Promise: Σ grad_yᵀ x is the gradient of the weight, also through layers that write to what
    they are given, in eval mode, and whatever gradient mode `attach` is called in."""
    model, batches = InPlace(), [X, 2 * X[:3]]
    expected = expected_gradients(InPlace(), batches)
    with mode():
        ll.attach(model, Graded(), targets="layers", calibration=batches, loss=squares)
    for path, gradient in expected.items():
        torch.testing.assert_close(Graded.seen[path]["G"].float(), gradient)
        assert Graded.seen[path]["rows"] == 10


def test_leaves_no_trace() -> None:
    """Promise: the base, its flags and modes are as before, nothing has a gradient, and nothing of
    a batch is kept; other adapters are not seen."""
    model = InPlace().train()
    model.layers[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = ll.attach(model, "lora", r=2, targets="layers", name="other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    batch = X.clone().requires_grad_()
    refs = []

    def loss(output: Tensor, given: Tensor) -> Tensor:
        refs.append(weakref.ref(output))
        return squares(output, given)

    adapter = ll.attach(model, Graded(), targets="layers", calibration=[batch], loss=loss)
    expected = expected_gradients(InPlace(), [X])
    torch.testing.assert_close(Graded.seen["layers.1"]["G"].float(), expected["layers.1"])
    assert refs[0]() is None
    assert batch.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert model.drop.training
    adapter.detach()
    other.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_padding_is_dropped(tiny_llama: Callable[..., nn.Module]) -> None:
    """Promise: observers see the rows that the mask keeps, of x, y and gradient alike."""
    tokens = torch.tensor([[5, 9, 3, 0, 0], [4, 7, 2, 8, 6]])
    mask = (tokens > 0).long()
    labels = tokens.masked_fill(tokens == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    model = tiny_llama()
    ll.attach(model, Graded(), targets=r"layers\.1.*down_proj$", calibration=[batch])
    ((_, statistics),) = [item for item in Graded.seen.items() if "down_proj" in item[0]]
    assert statistics["rows"] == 8
    plain = tiny_llama()
    plain(**batch).loss.backward()
    expected = plain.get_submodule("model.layers.1.mlp.down_proj").weight.grad
    torch.testing.assert_close(statistics["G"].float(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"the model's output has no loss"),
        ({"loss": lambda output, _: output}, r"loss= returns no scalar"),
        ({"loss": lambda output, _: output.detach().sum()}, r"does not depend on any"),
        ({"loss": 3}, r"loss=3 is not a function"),
        ({"loss": squares, "calibration": None}, r"needs calibration data"),
        ({"loss": squares, "calibration": []}, r"is empty"),
    ],
)
def test_a_wrong_loss_is_told(options: dict[str, Any], message: str) -> None:
    """Promise: without a usable loss, an error says so, and the model is as before."""
    model = InPlace()
    before = set(model.state_dict())
    with pytest.raises(ll.CalibrationError, match=message):
        ll.attach(model, Graded(), targets="layers", **{"calibration": [X], **options})
    assert set(model.state_dict()) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_that_nobody_needs_is_refused() -> None:
    """Promise: loss= for a variant that looks at no gradients is an error, not ignored."""
    with pytest.raises(ll.CalibrationError, match=r"eva looks at no gradients"):
        ll.attach(InPlace(), "eva", r=2, targets="layers", calibration=[X], loss=squares)
