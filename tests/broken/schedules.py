"""Mistakes: schedules and shared tensors."""

from typing import ClassVar

import torch
from broken.sound import Sound, caught_by
from lora_lite.author import CLOCK, TensorSpec


class Scheduled(Sound, name="scheduled"):
    """Keeps a moving average of A as a declared tensor, and pulls A to it every other step."""

    def tensors(self, site):
        average = TensorSpec((self.r, site.d_in), trainable=False, dtype=torch.float32)
        return {**super().tensors(site), "average": average, "step": CLOCK}

    def init(self, site, derived, statistics, rng):
        start = super().init(site, derived, statistics, rng)
        clock = torch.zeros(1, dtype=torch.int64)
        return {**start, "average": start["A"].clone(), "step": clock}

    def advance(self, sites, t, step):
        for tensors in t.values():
            tensors["average"].lerp_(tensors["A"].float(), 0.5)
            if step % 2 == 0:
                tensors["A"].lerp_(tensors["average"].to(tensors["A"]), 0.5)


@caught_by("schedules_resume", r"two runs differ|of a run that was resumed")
class CountsInPython(Scheduled, name="counts_in_python"):
    seen: ClassVar[list[int]] = []

    def advance(self, sites, t, step):
        self.seen.append(step)
        super().advance(sites, t, len(self.seen) % 3)


@caught_by("schedules_resume", r"of a run that was resumed")
class RemembersInPython(Scheduled, name="remembers_in_python"):
    """Its average begins anew where the run does."""

    last: ClassVar[dict[int, torch.Tensor]] = {}

    def advance(self, sites, t, step):
        for tensors in t.values():
            key = id(tensors["A"])
            tensors["A"].lerp_(self.last.get(key, tensors["A"]).to(tensors["A"]), 0.5)
            self.last[key] = tensors["A"].clone()
            tensors["average"].copy_(tensors["A"])


@caught_by("start_depends_on_seed_path_and_name_alone", r"start values of the same seed")
class SharesWhatDiffers(Sound, name="shares_what_differs"):
    """A shared tensor that starts otherwise at each layer."""

    def tensors(self, site):
        specs = super().tensors(site)
        return {**specs, "A": TensorSpec(specs["A"].shape, shared="A")}

    def init(self, site, derived, statistics, rng):
        start = super().init(site, derived, statistics, rng)
        return {**start, "A": start["A"] * (1 + len(site.path) + sum(map(ord, site.path)))}
