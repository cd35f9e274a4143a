"""Mistakes: wrappers."""

import random
from typing import Any, ClassVar

from broken.sound import Sound, caught_by
from pydantic import BaseModel, PrivateAttr


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
