"""Mistakes: forward."""

from typing import Any, ClassVar

import numpy as np
import torch
from broken.sound import Sound, caught_by
from lora_lite.author import TensorSpec
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn.functional import dropout


@caught_by("output_is_of_the_bases_kind", r"float32.* for an activation of (bfloat16|float64)")
class LeaksFloat32(Sound, name="leaks_float32"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y).float()


@caught_by("output_is_of_the_bases_kind", r"float64.* for an activation of (float32|bfloat16)")
class LeaksFloat64(Sound, name="leaks_float64"):
    factors: ClassVar[Any] = np.ones(1)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * torch.from_numpy(self.factors)


@caught_by("output_is_of_the_bases_kind", r"float32.* for an activation of (bfloat16|float64)")
class HasADtypeFromImport(Sound, name="has_a_dtype_from_import"):
    one: ClassVar[Tensor] = torch.ones(1)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * self.one


@caught_by(
    "computes_where_its_tensors_are", r"is not on the expected device meta|on the same device"
)
class HasADeviceFromImport(Sound, name="has_a_device_from_import"):
    one: ClassVar[Tensor] = torch.ones(1)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * self.one.to(x.dtype)


@caught_by(
    "computes_where_its_tensors_are",
    r"on the device meta, these were computed elsewhere: {'factor': 'cpu'}",
)
class PreparesOnTheCpu(Sound, name="prepares_on_the_cpu"):
    def prepare(self, site, t):
        return {"factor": torch.tensor(self.gain, dtype=site.dtype)}

    def delta_output(self, site, t, x, y):
        return t["factor"] * super().delta_output(site, t, x, y)


class _FromY(Sound):
    """Δy = g ⊙ W x, as the formula means it, computed from y."""

    def tensors(self, site):
        return {"g": TensorSpec((site.d_out,))}

    def init(self, site, derived, statistics, rng):
        return {"g": torch.zeros(site.d_out)}

    def macs_per_token(self, site):
        return 0


@caught_by("bias_goes_through", r"acts_on_bias is False; the output at x = 0")
class ScalesTheBias(_FromY, name="scales_the_bias"):
    def delta_output(self, site, t, x, y):
        return t["g"] * y


@caught_by(
    "bias_goes_through",
    r"acts_on_bias is True; the output at x = 0, against the bias: expected a difference",
)
class SaysItActsOnTheBias(_FromY, name="says_it_acts_on_the_bias"):
    acts_on_bias: ClassVar[bool] = True

    def delta_output(self, site, t, x, y):
        return t["g"] * (y - site.bias().to(y.dtype) if site.has_bias else y)


@caught_by("start_matches_identity", r"has no bias|without a bias")
class ExpectsABias(_FromY, name="expects_a_bias"):
    def delta_output(self, site, t, x, y):
        return t["g"] * (y - site.bias().to(y.dtype))


@caught_by("gradients_agree_with_finite_differences", r"gradient by A disagrees")
class DetachesOnTheWay(Sound, name="detaches_on_the_way"):
    def delta_output(self, site, t, x, y):
        norm = t["A"].detach().norm()
        return super().delta_output(site, t, x, y) / norm


@caught_by("gradients_agree_with_finite_differences", r"gradient by x disagrees")
class HasAWrongBackward(Sound, name="has_a_wrong_backward"):
    def delta_output(self, site, t, x, y):
        return _Doubled.apply(super().delta_output(site, t, x, y))


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


@caught_by("gradients_agree_with_finite_differences", r"listed in `detached`, yet")
class DetachesAConstant(Sound, name="detaches_a_constant"):
    detached: ClassVar[tuple[str, ...]] = ("norm",)

    def prepare(self, site, t):
        return {"norm": site.weight().norm()}


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"rows one by one")
class CentresOverTheBatch(Sound, name="centres_over_the_batch"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x - x.mean(0, keepdim=True), y)


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"tokens one by one")
class LooksAtTheNextToken(Sound, name="looks_at_the_next_token"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x + 0.1 * x.roll(1, dims=-2) if x.ndim > 1 else x, y)


@caught_by("empty_batch_gives_empty_output", r"non-empty")
class LoopsOverRows(Sound, name="loops_over_rows"):
    def delta_output(self, site, t, x, y):
        rows = [
            super(LoopsOverRows, self).delta_output(site, t, row, y)
            for row in x.reshape(-1, site.d_in)
        ]
        return torch.stack(rows).reshape(y.shape)


@caught_by("works_under_autocast", r"same scalar type")
class AddsInPlaceAcrossDtypes(Sound, name="adds_in_place_across_dtypes"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        shift = x.mean(-1, keepdim=True) * t["B"].sum(1)
        return delta.index_add(-1, torch.arange(site.d_out), shift)


@caught_by("macs_are_as_declared", r"declared .* counted")
class CountsOneFactor(Sound, name="counts_one_factor"):
    def macs_per_token(self, site):
        return self.r * site.d_in


@caught_by("macs_are_as_declared", r"declared .* counted")
class MultipliesOutUncounted(Sound, name="multiplies_out_uncounted"):
    def prepare(self, site, t):
        return {"norm": 1 + (t["B"] @ t["A"]).norm()}


@caught_by("deltas_write_nothing", r"after prepare and deltas: y")
class WritesIntoY(Sound, name="writes_into_y"):
    def delta_output(self, site, t, x, y):
        return y.sub_(y.clone()) + super().delta_output(site, t, x, y)


@caught_by("deltas_write_nothing", r"after prepare and deltas: x")
class WritesIntoX(Sound, name="writes_into_x"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x.mul_(self.gain), y) / self.gain


@caught_by("outputs_depend_on_tensors_alone", r"random state after a forward in eval mode")
class DropsOutInEval(Sound, name="drops_out_in_eval"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, dropout(x, 0.5), y)


@caught_by("outputs_depend_on_tensors_alone", r"a model's output after")
class RemembersTheLastInput(Sound, name="remembers_the_last_input"):
    _mean: float = PrivateAttr(default=1.0)

    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y) * self._mean
        self._mean = float(x.detach().abs().mean())
        return delta
