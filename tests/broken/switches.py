"""Mistakes: switches."""

from typing import ClassVar

import torch
from broken.sound import Sound, caught_by


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


@caught_by("frozen_changes_nothing", r"with gradients, against without")
class PreparesByMode(Sound, name="prepares_by_mode"):
    def prepare(self, site, t):
        return {"factor": t["A"].new_tensor(2.0 if torch.is_grad_enabled() else 1.0)}

    def delta_output(self, site, t, x, y):
        return t["factor"] * super().delta_output(site, t, x, y)
