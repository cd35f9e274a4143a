"""The conformance suite is tested itself: a sound variant passes; every mistake below, of a kind that people make, is caught
by the test that is meant for it; and the suite cannot be talked out of a test.
"""

import random
import re
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from lora_lite import Site, SiteError, TensorSpec, Variant, check_rank
from lora_lite.testing import PROMISES, NewPromiseWarning, Subject, VariantTests
from lora_lite.testing.suite import _as_test
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, PrivateAttr
from torch import Tensor
from torch.nn.functional import dropout


class Sound(Variant, name="sound"):
    """Δy = gain · B (A x): right in every respect, and the ground on which the mistakes are made."""

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


class Rich(Variant, name="rich"):
    """Uses every stage of the contract: Δx = x ⊙ (m ⊙ n / |n| + p P), with m from calibration data and turned round, P derived
    from the base, a norm that is constant to gradients, a set that n stays in, and a penalty. It takes the scale itself.
    """

    takes_scale: ClassVar[bool] = True
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


class TestSound(VariantTests):
    variant = Sound


class TestRich(VariantTests):
    variant = Rich


BROKEN: list[tuple[type[Variant], str, str]] = []


def caught_by(promise: str, told: str):
    """The promise that a mistake breaks, and what the failure says (a regular expression)."""

    def register(cls: type[Variant]) -> type[Variant]:
        BROKEN.append((cls, promise, told))
        return cls

    return register


# --- fields


@caught_by("fits_most_draws", r"refuses .* of .* draws")
class RefusesNearlyEverything(Sound, name="refuses_nearly_everything"):
    def tensors(self, site):
        if site.d_in != 12 or self.r != 2:
            raise SiteError("r", "only the shape of my own model")
        return super().tensors(site)


@caught_by("fields_survive_json", r"became halves_its_field")
class HalvesItsField(Sound, name="halves_its_field"):
    strength: Annotated[float, AfterValidator(lambda value: value / 2)] = 1.0


@caught_by("fits_most_draws", r"(?s)refuses .* of .* draws.*an even rank of at least 8")
class ChecksLateWhatItsFieldAllows(Sound, name="checks_late_what_its_field_allows"):
    def tensors(self, site):
        if self.r % 8:
            raise SiteError("r", "expected an even rank of at least 8")
        return super().tensors(site)


@caught_by("fields_survive_json", r"became .*widths=\[1, 2\]")
class HoldsWhatJsonDoesNotHave(Sound, name="holds_what_json_does_not_have"):
    widths: Any = (1, 2)


@caught_by("fields_survive_json", r"unhashable type: 'list'")
class HasAMutableDefault(Sound, name="has_a_mutable_default"):
    gains: list[float] = [1.0]


@caught_by("bad_fields_are_refused", r"no_such_field=1 was accepted")
class IgnoresUnknownFields(Sound, name="ignores_unknown_fields"):
    model_config = ConfigDict(extra="ignore")


@caught_by("bad_fields_are_refused", r"r=True was accepted")
class TakesTextForNumbers(Sound, name="takes_text_for_numbers"):
    model_config = ConfigDict(strict=False)


# --- start


@caught_by("start_matches_identity", r"identity 'exact'")
class StartsOffTheBase(Sound, name="starts_off_the_base"):
    def init(self, site, derived, statistics, rng):
        return {
            **super().init(site, derived, statistics, rng),
            "B": torch.full((site.d_out, self.r), 1e-3),
        }


@caught_by("start_matches_identity", r"identity 'exact'")
class RoundsWhereItSaysExact(Sound, name="rounds_where_it_says_exact"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        return (y * 1.1 + delta) - y / 3 * 3.3


@caught_by("start_matches_identity", r"shapes cannot be multiplied")
class RightForSquareLayersOnly(Sound, name="right_for_square_layers_only"):
    def tensors(self, site):
        return {**super().tensors(site), "A": TensorSpec((self.r, site.d_out))}

    def init(self, site, derived, statistics, rng):
        return {
            "A": torch.randn(self.r, site.d_out, generator=rng("A")),
            "B": torch.zeros(site.d_out, self.r),
        }


@caught_by("start_is_not_better_than_declared", r"zero_start=True\) declares identity 'none', yet")
class ExcusesItselfForAllFields(Sound, name="excuses_itself_for_all_fields"):
    zero_start: bool = True

    @property
    def identity(self):
        return "none"

    def init(self, site, derived, statistics, rng):
        b = (
            torch.zeros(site.d_out, self.r)
            if self.zero_start
            else torch.randn(site.d_out, self.r, generator=rng("B"))
        )
        return {**super().init(site, derived, statistics, rng), "B": b}


@caught_by("start_is_not_better_than_declared", r"declares identity 'none'")
class ExcusesItselfFromTheStart(Sound, name="excuses_itself_from_the_start"):
    @property
    def identity(self):
        return "none"


@caught_by("only_declared_tensors_appear", r"undeclared: .*last_norm")
class CachesOnTheModule(Sound, name="caches_on_the_module"):
    def delta_output(self, site, t, x, y):
        site._module.last_norm = x.detach().norm()
        return super().delta_output(site, t, x, y)


@caught_by("only_declared_tensors_appear", r"undeclared: .*extra")
class AddsAParameterByItself(Sound, name="adds_a_parameter_by_itself"):
    def init(self, site, derived, statistics, rng):
        site._module.extra = torch.nn.Parameter(torch.zeros(site.d_out))
        return super().init(site, derived, statistics, rng)


@caught_by("parameters_are_as_counted", r"meta")
class ChoosesItsRankByTheWeights(Sound, name="chooses_its_rank_by_the_weights"):
    def tensors(self, site):
        r = int((torch.linalg.svdvals(site.weight()) > 1).sum())
        return {"A": TensorSpec((r, site.d_in)), "B": TensorSpec((site.d_out, r))}


@caught_by("parameters_are_as_counted", r"meta")
class CountsFromTheWeights(Sound, name="counts_from_the_weights"):
    def macs_per_token(self, site):
        return self.r * int(site.weight().count_nonzero() / site.d_in + site.d_in)


@caught_by(
    "start_depends_on_seed_path_and_name_alone",
    r"start values of the same seed: .*A: expected the same bits",
)
class DrawsGlobally(Sound, name="draws_globally"):
    def init(self, site, derived, statistics, rng):
        return {**super().init(site, derived, statistics, rng), "A": torch.randn(self.r, site.d_in)}


@caught_by("start_depends_on_seed_path_and_name_alone", r"init draws")
class DrawsTheSameForEverySeed(Sound, name="draws_the_same_for_every_seed"):
    def init(self, site, derived, statistics, rng):
        rng("A")
        fixed = torch.Generator().manual_seed(0)
        return {
            **super().init(site, derived, statistics, rng),
            "A": torch.randn(self.r, site.d_in, generator=fixed),
        }


@caught_by("attach_leaves_the_random_state", r"random state after attach")
class MakesAThrowawayLayer(Sound, name="makes_a_throwaway_layer"):
    def init(self, site, derived, statistics, rng):
        torch.nn.Linear(site.d_in, self.r)
        return super().init(site, derived, statistics, rng)


class _Derives(Sound):
    def tensors(self, site):
        return {
            **super().tensors(site),
            "U": TensorSpec((site.d_out, 1), trainable=False, derived=True),
        }


@caught_by("derived_tensors_come_again", r"U, derived with other signs of a decomposition")
class LeavesSignsToTheMachine(_Derives, name="leaves_signs_to_the_machine"):
    def derive(self, site):
        return {"U": torch.linalg.svd(site.weight(), full_matrices=False).U[:, :1]}


@caught_by("derived_tensors_come_again", r"U, derived with other signs of a decomposition")
class LeavesSignsOfTheGramMatrix(_Derives, name="leaves_signs_of_the_gram_matrix"):
    def derive(self, site):
        return {
            "U": torch.linalg.eigh(site.matmul(site.weight())).eigenvectors[
                :, [-min(site.d_in, site.d_out)]
            ]
        }


@caught_by("derived_tensors_come_again", r"P, derived on a copy")
class DerivesByPlace(Sound, name="derives_by_place"):
    def tensors(self, site):
        return {
            **super().tensors(site),
            "P": TensorSpec((site.d_in,), trainable=False, derived=True),
        }

    def derive(self, site):
        return {"P": site.weight().norm(dim=0) * (1 + id(site._module) % 97)}


@caught_by("derived_tensors_come_again", r"derive, called again: P")
class DerivesAtRandom(Sound, name="derives_at_random"):
    def tensors(self, site):
        return {**super().tensors(site), "P": TensorSpec((self.r,), trainable=False, derived=True)}

    def derive(self, site):
        return {"P": torch.rand(self.r)}


@caught_by("adapter_is_freed", r"modules of a deleted model with an adapter are still held")
class KeepsAClosure(Sound, name="keeps_a_closure"):
    undo: ClassVar[list[Any]] = []

    def init(self, site, derived, statistics, rng):
        self.undo.append(lambda: site.weight())
        return super().init(site, derived, statistics, rng)


@caught_by("adapter_is_freed", r"tensors of a detached adapter are still held")
class KeepsTheLastTensors(Sound, name="keeps_the_last_tensors"):
    last: ClassVar[dict[str, Tensor]] = {}

    def penalty(self, site, t):
        return sum(p.square().mean() for p in self.last.values()) if self.last else None

    def delta_output(self, site, t, x, y):
        self.last.update(t)
        return super().delta_output(site, t, x, y)


@caught_by("adapter_is_freed", r"are still held")
class KeepsItsSites(Sound, name="keeps_its_sites"):
    sites_seen: ClassVar[list[Site]] = []

    def init(self, site, derived, statistics, rng):
        self.sites_seen.append(site)
        return super().init(site, derived, statistics, rng)


# --- forward


@caught_by("output_is_of_the_bases_kind", r"float32.* for an activation of bfloat16")
class LeaksFloat32(Sound, name="leaks_float32"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y).float()


@caught_by("output_is_of_the_bases_kind", r"float64.* for an activation of (float32|bfloat16)")
class LeaksFloat64(Sound, name="leaks_float64"):
    factors: ClassVar[Any] = np.ones(1)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * torch.from_numpy(self.factors)


@caught_by("output_is_of_the_bases_kind", r"float32.* for an activation of bfloat16")
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


@caught_by("start_matches_identity", r"this site has no bias")
class ExpectsABias(_FromY, name="expects_a_bias"):
    def delta_output(self, site, t, x, y):
        return t["g"] * (y - site.bias().to(y.dtype))


@caught_by("gradients_agree_with_finite_differences", r"gradient by lora_default_A disagrees")
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


@caught_by("outputs_depend_on_tensors_alone", r"a model's output after")
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


# --- training


@caught_by("every_parameter_learns_and_nothing_else", r"forgotten got no gradient")
class HasADeadParameter(Sound, name="has_a_dead_parameter"):
    def tensors(self, site):
        return {**super().tensors(site), "forgotten": TensorSpec((site.d_out,))}

    def init(self, site, derived, statistics, rng):
        return {
            **super().init(site, derived, statistics, rng),
            "forgotten": torch.zeros(site.d_out),
        }


@caught_by("every_parameter_learns_and_nothing_else", r"exactly zero in each of the first 3 steps")
class StartsBothFactorsAtZero(Sound, name="starts_both_factors_at_zero"):
    def init(self, site, derived, statistics, rng):
        return {name: torch.zeros(spec.shape) for name, spec in self.tensors(site).items()}


@caught_by("learns_what_it_can_express", r"mean square error fell")
class ClimbsInsteadOfDescending(Sound, name="climbs_instead_of_descending"):
    def delta_output(self, site, t, x, y):
        return _Negated.apply(super().delta_output(site, t, x, y))


class _Negated(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -gradient


@caught_by("project_and_penalty_are_sound", r"A: project at the start")
class ShrinksAtEveryProjection(Sound, name="shrinks_at_every_projection"):
    def project(self, site, t):
        t["A"].mul_(0.9)


@caught_by("project_and_penalty_are_sound", r"the penalty has shape")
class PenalisesRowByRow(Sound, name="penalises_row_by_row"):
    def penalty(self, site, t):
        return t["A"].square().sum(1)


@caught_by("accumulated_gradients_add_up", r"second time")
class KeepsItsGraph(Sound, name="keeps_its_graph"):
    _norm: dict[int, Tensor] = PrivateAttr(default_factory=dict)

    def delta_output(self, site, t, x, y):
        norm = self._norm.setdefault(id(site._module), 1 + t["A"].square().mean())
        return super().delta_output(site, t, x, y) / norm


@caught_by("checks_clean", r"B: the gradient is zero")
class LearnsAtItsStartOnly(Sound, name="learns_at_its_start_only"):
    def delta_output(self, site, t, x, y):
        b = t["B"]
        return super().delta_output(
            site, {**t, "B": torch.where(b.abs() < 1e-9, b, b.detach())}, x, y
        )


@caught_by("project_and_penalty_are_sound", r"project puts other tensors under \['n'\]")
class ProjectsIntoTheVoid(Rich, name="projects_into_the_void"):
    def project(self, site, t):
        t["n"] = t["n"].clamp(-self.limit, self.limit)


# --- calibration


class _Observes(Rich):
    def observe(self, site):
        return self.Observer(site.d_in, self.side)


@caught_by("every_batch_of_calibration_counts", r"those without batch 0")
class CountsTheLastBatch(_Observes, name="counts_the_last_batch"):
    class Observer(Sizes):
        def update(self, x, y):
            self.sum, self.max, self.rows = (
                torch.zeros_like(self.sum),
                torch.zeros_like(self.max),
                0,
            )
            super().update(x, y)


@caught_by("every_batch_of_calibration_counts", r"those without batch 1")
class CountsTheFirstBatch(_Observes, name="counts_the_first_batch"):
    class Observer(Sizes):
        def update(self, x, y):
            if not self.rows:
                super().update(x, y)


@caught_by("every_batch_of_calibration_counts", r"x after update")
class ObservesInPlace(_Observes, name="observes_in_place"):
    class Observer(Sizes):
        def update(self, x, y):
            super().update(x.abs_(), y)


@caught_by("calibration_keeps_no_batch", r"bytes more than after")
class KeepsEveryBatch(_Observes, name="keeps_every_batch"):
    class Observer(Sizes):
        def update(self, x, y):
            self.batches = [*getattr(self, "batches", []), 2 * x]
            super().update(x, y)


# --- switches


@caught_by("scale_fades_from_base_to_adapter", r"scale 0, against the base")
class IgnoresTheScale(Sound, name="ignores_the_scale"):
    takes_scale = True

    def delta_output(self, site, t, x, y, *, scale=1.0):
        return super().delta_output(site, t, x, y)

    def prepare(self, site, t, *, scale=1.0):
        return {}


@caught_by("adapters_add_up_in_any_order", r"attached as b, a")
class CountsItsAdapters(Sound, name="counts_its_adapters"):
    attached: ClassVar[list[str]] = []

    def init(self, site, derived, statistics, rng):
        self.attached.append(site.path)
        values = super().init(site, derived, statistics, rng)
        return {**values, "A": values["A"] * len(self.attached)}


@caught_by("frozen_changes_nothing", r"frozen with gradients")
class PreparesByMode(Sound, name="prepares_by_mode"):
    def prepare(self, site, t):
        return {"factor": t["A"].new_tensor(2.0 if torch.is_grad_enabled() else 1.0)}

    def delta_output(self, site, t, x, y):
        return t["factor"] * super().delta_output(site, t, x, y)


# --- base


@caught_by("base_is_untouched", r"base parameter .*layer.weight after attach")
class NormalisesTheBase(Sound, name="normalises_the_base"):
    def init(self, site, derived, statistics, rng):
        site.weight().div_(1.01)
        return super().init(site, derived, statistics, rng)


@caught_by("base_is_untouched", r"base parameter .*layer.weight after training")
class WritesTheBaseInTraining(Sound, name="writes_the_base_in_training"):
    def project(self, site, t):
        site.weight().add_(1e-3)


@caught_by("base_is_untouched", r"_forward_hooks")
class LeavesAHook(Sound, name="leaves_a_hook"):
    def init(self, site, derived, statistics, rng):
        site._module.register_forward_hook(lambda *_: None)
        return super().init(site, derived, statistics, rng)


# --- files


@caught_by("save_and_load_are_bitwise", r"the output after loading")
class KeepsANumberOnTheObject(Sound, name="keeps_a_number_on_the_object"):
    _norm: float = PrivateAttr(default=1.0)

    def init(self, site, derived, statistics, rng):
        self._norm = float(site.weight().norm())
        return super().init(site, derived, statistics, rng)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) / self._norm


@caught_by("save_and_load_are_bitwise", r"random state after load")
class DrawsAgainOnLoading(Sound, name="draws_again_on_loading"):
    def state_dict(self, site, t):
        return {"B": t["B"]}

    def load_state_dict(self, site, saved):
        return {"A": torch.randn(self.r, site.d_in), **saved}


class _Frozen(Sound):
    def tensors(self, site):
        return {**super().tensors(site), "m": TensorSpec((site.d_in,), trainable=False)}

    def init(self, site, derived, statistics, rng):
        return {
            **super().init(site, derived, statistics, rng),
            "m": torch.rand(site.d_in, generator=rng("m")),
        }

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x * t["m"], y)


@caught_by("save_and_load_are_bitwise", r"the output after loading: expected the same bits")
class ForgetsAFrozenTensor(_Frozen, name="forgets_a_frozen_tensor"):
    def state_dict(self, site, t):
        return {name: value for name, value in t.items() if name != "m"}

    def load_state_dict(self, site, saved):
        return {**saved, "m": torch.ones(site.d_in, dtype=site.dtype)}


@caught_by("save_and_load_are_bitwise", r"the output after loading: expected the same bits")
class SavesInHalf(Sound, name="saves_in_half"):
    def state_dict(self, site, t):
        return {name: value.half() for name, value in t.items()}

    def load_state_dict(self, site, saved):
        return {name: value.float() for name, value in saved.items()}


@caught_by("another_process_loads_the_same", r"output of another process")
class KeepsNumbersInTheClass(Sound, name="keeps_numbers_in_the_class"):
    norms: ClassVar[dict[str, float]] = {}

    def init(self, site, derived, statistics, rng):
        self.norms[site.path] = float(site.weight().norm())
        return super().init(site, derived, statistics, rng)

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) / self.norms.get(site.path, 1.0)


@caught_by("file_without_derived_tensors_is_close", r"come out differently")
class TrainsADerivedTensor(Sound, name="trains_a_derived_tensor"):
    def tensors(self, site):
        return {
            **super().tensors(site),
            "P": TensorSpec((site.d_in,), trainable=False, derived=True),
        }

    def derive(self, site):
        return {"P": site.weight().float().norm(dim=0)}

    def project(self, site, t):
        t["P"].fill_(t["A"].norm().item())

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x * t["P"], y)


@caught_by("state_dicts_round_trip", r"after load_state_dict")
class LoadsWhatItLikes(Sound, name="loads_what_it_likes"):
    def load_state_dict(self, site, saved):
        return {"A": saved["A"], "B": saved.get("B", torch.zeros(site.d_out, self.r)) * 0.5}


# --- wrappers


class _Handle(BaseModel):
    """Something that a copy shares: it says so itself."""

    tensors: dict[str, Any] = {}

    def __deepcopy__(self, memo: Any) -> "_Handle":
        return self


@caught_by("copies_are_independent", r"a deep copy with other parameters")
class SharesWithItsCopies(Sound, name="shares_with_its_copies"):
    _handle: _Handle = PrivateAttr(default_factory=_Handle)

    def delta_output(self, site, t, x, y):
        self._handle.tensors = self._handle.tensors or dict(t)
        return super().delta_output(site, self._handle.tensors, x, y)


@caught_by("pickles_are_independent", r"lambda")
class HoldsALambda(Sound, name="holds_a_lambda"):
    _activation: Any = PrivateAttr(default_factory=lambda: lambda z: z)


@caught_by("checkpointing_changes_nothing", r"with checkpointing, against without")
class DrawsFromPythonsRandom(Sound, name="draws_from_pythons_random"):
    def delta_output(self, site, t, x, y):
        noise = 1 + random.random() if site.training else 1.0
        return super().delta_output(site, t, x, y) * noise


@caught_by("checkpointing_changes_nothing", r"with checkpointing, against without")
class CountsItsCalls(Sound, name="counts_its_calls"):
    calls: ClassVar[list[int]] = [0]

    def delta_output(self, site, t, x, y):
        self.calls[0] += site.training
        return (
            super().delta_output(site, t, x, y) / self.calls[0]
            if site.training
            else super().delta_output(site, t, x, y)
        )


@caught_by("compiles_whole_and_once", r"data-dependent")
class LooksAtAValue(Sound, name="looks_at_a_value"):
    def delta_output(self, site, t, x, y):
        if float(t["B"].detach().abs().max()) > 1e9:
            raise ValueError("diverged")
        return super().delta_output(site, t, x, y)


@caught_by("compiles_whole_and_once", r"Data-dependent|data-dependent")
class BranchesOnAValue(Sound, name="branches_on_a_value"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        return delta * 2 if t["B"].sum() > 0 else delta


@caught_by("compiles_whole_and_once", r"compilations after steps and a swap")
class BakesInAValue(Sound, name="bakes_in_a_value"):
    steps: ClassVar[list[int]] = [0]

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * (1 + 1e-6 * self.steps[0])

    def project(self, site, t):
        self.steps[0] += 1


@pytest.mark.parametrize(("cls", "promise", "told"), BROKEN, ids=[cls.name for cls, *_ in BROKEN])
def test_each_mistake_is_caught_by_its_test(cls: type[Variant], promise: str, told: str) -> None:
    with pytest.raises(Exception, match=told):
        PROMISES[promise].run(Subject.of(cls))


def test_every_test_has_a_mistake_that_it_catches() -> None:
    assert {promise for _, promise, _ in BROKEN} == PROMISES.keys()


def test_every_promise_says_what_why_and_what_breaks_it() -> None:
    for promise in PROMISES.values():
        paragraphs = promise.text.split("\n\n")
        assert len(paragraphs) == 2, promise.name
        assert "Usually broken" in paragraphs[1].replace("\n", " "), promise.name


def test_the_contract_page_has_every_promise() -> None:
    page = (Path(__file__).parents[1] / "docs/contract.md").read_text().split("## Promises")[1]
    expected = {
        name: " ".join(promise.text.split("\n\n")[0].split()) for name, promise in PROMISES.items()
    }
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)) == expected


def test_a_strategy_of_one_point_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"of sound\.r, only 2 was taken"):
        PROMISES["fits_most_draws"].run(Subject.of(Sound, {"r": st.just(2)}))


def test_a_strategy_for_a_field_that_is_not_there() -> None:
    with pytest.raises(TypeError, match="has no field rank"):
        PROMISES["fits_most_draws"].run(Subject.of(Sound, {"rank": st.just(2)}))


# --- the suite's own rules


def test_tests_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type(
            "Overrides",
            (VariantTests,),
            {"variant": Sound, "test_base_is_untouched": lambda _: None},
        )


def test_tests_cannot_be_removed() -> None:
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type("Removes", (VariantTests,), {"variant": Sound, "test_macs_are_as_declared": None})


def test_tests_cannot_be_overridden_by_a_second_base() -> None:
    mixin = type("Mixin", (), {"test_macs_are_as_declared": lambda _: None})
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        type("Mixed", (mixin, VariantTests), {"variant": Sound})


@pytest.mark.parametrize(
    "name",
    [
        "test_base_is_untouched",
        "test_only_declared_tensors_appear",
        "test_save_and_load_are_bitwise",
    ],
)
def test_what_cannot_be_waived(name: str) -> None:
    with pytest.raises(TypeError, match="cannot be waived"):
        type("Waives", (VariantTests,), {"variant": Sound, "expected_failures": {name: "because"}})


def test_an_expected_failure_names_a_test_and_a_reason() -> None:
    with pytest.raises(TypeError, match="no test 'test_nothing'"):
        type(
            "Unknown",
            (VariantTests,),
            {"variant": Sound, "expected_failures": {"test_nothing": "because"}},
        )
    with pytest.raises(TypeError, match="needs a reason"):
        type(
            "Silent",
            (VariantTests,),
            {"variant": Sound, "expected_failures": {"test_macs_are_as_declared": " "}},
        )


def test_a_change_after_the_class_is_made_is_noticed() -> None:
    """Every other test of the class then fails."""
    tests = type("Changed", (VariantTests,), {"variant": Sound})
    tests.test_macs_are_as_declared = lambda _: None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="can be neither overridden nor removed"):
        tests().test_fields_survive_json()
    tests = type("Waived", (VariantTests,), {"variant": Sound})
    tests.expected_failures = {"test_base_is_untouched": "because"}
    with pytest.raises(TypeError, match="cannot be waived"):
        tests().test_fields_survive_json()


def test_an_expected_failure_is_reported_as_one() -> None:
    reasons = {"test_macs_are_as_declared": "they are counted elsewhere"}
    tests = type(
        "Declared", (VariantTests,), {"variant": CountsOneFactor, "expected_failures": reasons}
    )
    with pytest.raises(pytest.xfail.Exception, match="counted elsewhere"):
        tests().test_macs_are_as_declared()


def test_an_expected_failure_that_passes_fails() -> None:
    reasons = {"test_macs_are_as_declared": "they are counted elsewhere"}
    tests = type("Stale", (VariantTests,), {"variant": Sound, "expected_failures": reasons})
    with pytest.raises(pytest.fail.Exception, match="take it out of expected_failures"):
        tests().test_macs_are_as_declared()


MAJOR, MINOR = (int(number) for number in metadata.version("lora-lite-core").split(".")[:2])


def run_since(
    since: str, variant: type[Variant], expected_failures: dict[str, str] | None = None
) -> None:
    """A test of the suite, as it would be if its promise had come with that version of the core."""
    test = _as_test(
        "test_macs_are_as_declared", replace(PROMISES["macs_are_as_declared"], since=since)
    )
    attributes = {"variant": variant, "expected_failures": expected_failures or {}}
    test(type("Tests", (VariantTests,), attributes)())


def test_a_new_promise_warns_who_breaks_it() -> None:
    with pytest.warns(
        NewPromiseWarning, match=rf"since lora-lite-core {MAJOR}\.{MINOR}; .*: declared .* counted"
    ):
        run_since(f"{MAJOR}.{MINOR}", CountsOneFactor)


def test_a_new_promise_that_is_kept_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_since(f"{MAJOR}.{MINOR}", Sound)


def test_a_promise_of_the_minor_version_before_fails_who_breaks_it() -> None:
    before = f"{MAJOR}.{MINOR - 1}" if MINOR else f"{MAJOR - 1}.9"
    with pytest.raises(AssertionError, match=r"declared .* counted"):
        run_since(before, CountsOneFactor)


def test_a_new_promise_can_be_declared_an_expected_failure() -> None:
    with pytest.raises(pytest.xfail.Exception, match="counted elsewhere"):
        run_since(
            f"{MAJOR}.{MINOR}", CountsOneFactor, {"test_macs_are_as_declared": "counted elsewhere"}
        )


@pytest.mark.parametrize(
    ("since", "core", "new"),
    [
        ("", "0.1.0", False),
        ("0.2", "0.1.9", True),  # not released yet
        ("0.2", "0.2.0.dev1", True),
        ("0.2", "0.2.7", True),
        ("0.2", "0.3.0", False),
        ("0.9", "0.10.0", False),
        ("0.10", "0.10.1", True),
        ("1.4", "2.0", False),
    ],
)
def test_for_how_long_a_promise_is_new(since: str, core: str, new: bool) -> None:
    assert replace(PROMISES["macs_are_as_declared"], since=since).is_new(core) is new
