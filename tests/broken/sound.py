"""Two variants that keep every promise: the ground on which the mistakes are made."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import ScaledVariant, TensorSpec, Variant, check_rank
from pydantic import Field, PositiveInt
from torch import Tensor

BROKEN: list[tuple[type[Variant], str, str]] = []


def caught_by(promise: str, told: str) -> Callable[[type[Variant]], type[Variant]]:
    """The promise that a mistake breaks, and what the failure says (a regular expression)."""

    def register(cls: type[Variant]) -> type[Variant]:
        BROKEN.append((cls, promise, told))
        return cls

    return register


class Sound(Variant, name="sound"):
    """Δy = gain · B (A x): right in every respect, and the ground on which the mistakes are
    made.
    """

    r: PositiveInt = 2
    gain: Annotated[float, Field(gt=0)] = 1.0

    def tensors(self, site):
        check_rank(self.r, site)
        return {"A": TensorSpec((self.r, site.d_in)), "B": TensorSpec((site.d_out, self.r))}

    def init(self, site, derived, statistics, rng):
        return {
            "A": torch.randn(self.r, site.d_in, generator=rng("A")),
            "B": torch.zeros(site.d_out, self.r),
        }

    def delta_output(self, site, t, x, y):
        return self.gain * (x @ t["A"].T @ t["B"].T)

    def macs_per_token(self, site):
        return self.r * (site.d_in + site.d_out)


class Rich(ScaledVariant, name="rich"):
    """Uses every stage of the contract: Δx = x ⊙ (m ⊙ n / |n| + p P), with m from calibration data
    and turned round, P derived from the base, a norm that is constant to gradients, a set that n
    stays in, and a penalty. It takes the scale itself.
    """

    detached: ClassVar[tuple[str, ...]] = ("norm",)

    limit: Annotated[float, Field(gt=1, lt=5)] = 2.0
    side: Literal["mean", "max"] = "mean"

    @property
    def identity(self):
        return "none"

    def tensors(self, site):
        shape = (site.d_in,)
        return {
            "n": TensorSpec(shape, decay=False),
            "p": TensorSpec(shape, compute="float32"),
            "m": TensorSpec(shape, trainable=False),
            "order": TensorSpec(shape, trainable=False, dtype=torch.int64),
            "P": TensorSpec(
                shape, trainable=False, derived=True, dtype=torch.float32, compute="float32"
            ),
        }

    def derive(self, site):
        return {"P": site.weight().float().norm(dim=0)}

    def init(self, site, derived, statistics, rng):
        noise = 0.1 * torch.randn(site.d_in, generator=rng("n"))
        return {
            "n": 1 + noise,
            "p": torch.zeros(site.d_in),
            "m": statistics["size"],
            "order": torch.arange(site.d_in).flip(0),
        }

    def observe(self, site):
        return Sizes(site.d_in, self.side)

    def prepare(self, site, t, *, scale=1.0):
        return {"norm": t["n"].norm(), "p P": scale * t["p"] * t["P"]}

    def delta_input(self, site, t, x, *, scale=1.0):
        return x * (scale * t["m"][t["order"]] * t["n"] / t["norm"] + t["p P"].to(x.dtype))

    def project(self, site, t):
        t["n"].clamp_(-self.limit, self.limit)

    def penalty(self, site, t):
        return (t["n"] - 1).square().sum()


class Sizes:
    def __init__(self, width: int, side: str) -> None:
        self.side, self.sum, self.max, self.rows = side, torch.zeros(width), torch.zeros(width), 0

    def update(self, x: Tensor, y: Tensor) -> None:
        self.sum += x.float().abs().sum(0)
        self.max = torch.maximum(self.max, x.float().abs().amax(0))
        self.rows += len(x)

    def result(self) -> dict[str, Tensor]:
        return {"size": self.sum / self.rows if self.side == "mean" else self.max}
