"""AdaLoRA: spend a budget of ranks on the layers where they matter most.

    Δy = α/r P (Λ ∘ Q x)        P (d_out, r), Λ (r,), Q (r, d_in)
    penalty = reg Σ (‖Pᵀ P - I‖² + ‖Q Qᵀ - I‖²)

The i-th number of Λ, column of P and row of Q are a triplet. Its importance is

    s(Λ_i) + mean s(P_i) + mean s(Q_i),        s(w) = Ī Ū
    I = |w ∇w|,    Ī ← β₁ Ī + (1 - β₁) I,    Ū ← β₂ Ū + (1 - β₂) |I - Ī|

After a warm-up, the Λ of the least important triplets of all layers is set to 0 every few steps,
until the share `target` of them is left; from then on the choice stands. The budget falls
with the third power of the time that is left.

Start: Λ = 0, so Δ is bitwise 0; P and Q are N(0, 0.02²). At the first step Λ alone has a gradient.
Ī, Ū and the number of the step are kept in the file, so that training goes on from it. A weight of
zeros changes nothing in this.

Zhang et al. 2023, arXiv:2303.10512.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from lora_lite.author import (
    CLOCK,
    NonNegativeFinite,
    PositiveFinite,
    Rng,
    Site,
    Tensors,
    TensorSpec,
    Variant,
    check_rank,
)
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import linear

DEVIATION = 0.02
TRIPLET = ("P", "Lambda", "Q")

Memory = Annotated[float, Field(ge=0, lt=1)]


class AdaLoRA(Variant, name="adalora"):
    """LoRA in the form of a singular value decomposition, with ranks moved between layers.

    Attributes:
        r: the rank of every layer at the start.
        target: the share of all ranks that is left in the end.
        alpha: the scale is alpha / r.
        total: how many steps the training has: give the number of your run.
        warmup: the share of them that comes before the first choice.
        final: the share of them that comes after the last choice.
        every: how many steps lie between two choices.
        beta1: β₁, how much of the importance is kept from one step to the next.
        beta2: β₂, likewise for its uncertainty.
        reg: the weight of the penalty.
    """

    recommended_lr: ClassVar[float] = 1e-3

    r: PositiveInt = 12
    target: Annotated[float, Field(gt=0, le=1)] = 0.67
    alpha: PositiveFinite = 16.0
    total: PositiveInt = 1000
    warmup: Annotated[float, Field(ge=0, le=0.4)] = 0.1
    final: Annotated[float, Field(ge=0, le=0.5)] = 0.3
    every: PositiveInt = 10
    beta1: Memory = 0.85
    beta2: Memory = 0.85
    reg: NonNegativeFinite = 0.1

    @property
    def first(self) -> int:
        """The last step of the warm-up."""
        return int(self.warmup * self.total)

    @property
    def last(self) -> int:
        """The step of the last choice."""
        return self.total - int(self.final * self.total)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        check_rank(self.r, site)
        shapes = {"P": (site.d_out, self.r), "Lambda": (self.r,), "Q": (self.r, site.d_in)}
        trained = {name: TensorSpec(shape) for name, shape in shapes.items()}
        averages = {
            f"{kind}_{name}": TensorSpec(shape, trainable=False, dtype=torch.float32)
            for kind in ("mean", "spread")
            for name, shape in shapes.items()
        }
        kept = TensorSpec((self.r,), trainable=False, dtype=torch.bool)
        return {**trained, **averages, "kept": kept, "step": CLOCK}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        specs = self.tensors(site)
        start = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        start["kept"] = torch.ones(self.r, dtype=torch.bool)
        for name in ("P", "Q"):
            start[name] = DEVIATION * torch.randn(specs[name].shape, generator=rng(name))
        return start

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(self.alpha / self.r * t["Lambda"] * linear(x, t["Q"]), t["P"])

    def penalty(self, site: Site, t: Tensors) -> Tensor | None:
        if self.reg == 0:
            return None
        one = torch.eye(self.r).to(t["P"])
        p = (t["P"].T @ t["P"] - one).square().sum()
        q = (t["Q"] @ t["Q"].T - one).square().sum()
        return self.reg * (p + q)

    def advance(self, sites: Mapping[str, Site], t: Mapping[str, Tensors], step: int) -> None:
        if step < self.last:
            for tensors in t.values():
                self.observe_step(tensors)
        if step == self.last or (self.first < step < self.last and step % self.every == 0):
            self.choose(list(t.values()), self.budget(step, len(t)))
        elif step > self.last:
            for tensors in t.values():
                tensors["Lambda"].mul_(tensors["kept"])

    def observe_step(self, t: Tensors) -> None:
        """Bring Ī and Ū of one layer up to date."""
        for name in TRIPLET:
            w, mean, spread = t[name], t[f"mean_{name}"], t[f"spread_{name}"]
            now = torch.zeros_like(mean) if w.grad is None else (w * w.grad).abs().to(mean)
            mean.mul_(self.beta1).add_((1 - self.beta1) * now)
            spread.mul_(self.beta2).add_((1 - self.beta2) * (now - mean).abs())

    def budget(self, step: int, layers: int) -> int:
        """How many triplets all layers may have together."""
        most = layers * self.r
        target = max(1, round(self.target * most))
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((most - target) * left**3 + target)

    def choose(self, layers: list[Tensors], budget: int) -> None:
        """Keep the most important triplets of all layers, and set Λ of the others to 0."""
        importance = torch.cat([self.importance(t).to(layers[0]["Lambda"].device) for t in layers])
        order = importance.argsort(descending=True, stable=True)
        kept = torch.zeros_like(importance, dtype=torch.bool)
        kept[order[:budget]] = True
        for t, its in zip(layers, torch.split(kept, self.r), strict=True):
            t["kept"].copy_(its)
            t["Lambda"].mul_(t["kept"])

    def importance(self, t: Tensors) -> Tensor:
        """Of every triplet of a layer, (r,)."""
        s = {name: t[f"mean_{name}"] * t[f"spread_{name}"] for name in TRIPLET}
        return s["Lambda"] + s["P"].mean(0) + s["Q"].mean(1)

    def macs_per_token(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)
