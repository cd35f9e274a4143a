"""Mistakes: training."""

from typing import Any

import torch
from broken.sound import Rich, Sound, caught_by
from lora_lite.author import TensorSpec
from pydantic import PrivateAttr
from torch import Tensor


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
