"""Mistakes in projections, penalties and calibration."""

from typing import Any

import torch
from broken.calibration import _Observes
from broken.sound import Rich, Sizes, Sound, caught_by
from pydantic import PrivateAttr


@caught_by("project_and_penalty_are_sound", r"project writes to .*n.data")
class ProjectsData(Rich, name="projects_data"):
    def project(self, site, t):
        t["n"].data.clamp_(-self.limit, self.limit)


@caught_by("project_and_penalty_are_sound", r"project gives .*n new memory")
class ProjectsIntoNewMemory(Rich, name="projects_into_new_memory"):
    def project(self, site, t):
        t["n"].data = t["n"].data.clamp(-self.limit, self.limit)


@caught_by("project_and_penalty_are_sound", r"projecting the same values again")
class ProjectsAtRandom(Rich, name="projects_at_random"):
    """What is out of bounds starts anew, at another place in every process."""

    def project(self, site, t):
        outside = t["n"].abs() > self.limit
        t["n"].copy_(torch.where(outside, torch.rand_like(t["n"]), t["n"]))


@caught_by("project_and_penalty_are_sound", r"the gradient of the penalty: .*not finite")
class PenalisesByARoot(Sound, name="penalises_by_a_root"):
    def penalty(self, site, t):
        return t["B"].square().sum().sqrt()


@caught_by("project_and_penalty_are_sound", r"the penalty .* has no gradient")
class PenalisesConstants(Sound, name="penalises_constants"):
    def penalty(self, site, t):
        return t["A"].detach().square().sum()


@caught_by("every_batch_of_calibration_counts", r"without its last quarter")
class ObservesSixtyFourRows(_Observes, name="observes_sixty_four_rows"):
    class Observer(Sizes):
        def update(self, x, y):
            super().update(x[:64], y[:64])


@caught_by("calibration_adds_up_in_half_precision", r"size, from 600 batches in bfloat16")
class AddsUpInTheDtypeOfX(_Observes, name="adds_up_in_the_dtype_of_x"):
    class Observer(Sizes):
        def update(self, x, y):
            self.sum = self.sum.to(x.dtype) + x.abs().sum(0)
            self.max = self.max.to(x.dtype) + x.abs().amax(0)
            self.rows += len(x)


@caught_by("calibration_counts_rows_not_batches", r"from the same rows in other batches")
class AveragesTheBatches(_Observes, name="averages_the_batches"):
    class Observer(Sizes):
        def update(self, x, y):
            self.sum += x.float().abs().mean(0)
            self.rows += 1
            self.max = torch.maximum(self.max, self.sum / self.rows)


@caught_by("calibration_counts_rows_not_batches", r"from the same rows in other batches")
class MovesItsAverage(_Observes, name="moves_its_average"):
    class Observer(Sizes):
        def update(self, x, y):
            mean = x.float().abs().mean(0)
            self.sum = mean if not self.rows else 0.9 * self.sum + 0.1 * mean
            self.max, self.rows = self.sum, 1


@caught_by("calibration_takes_any_rows", r"from an input that is always zero: .*not finite")
class DividesByItsStatistics(_Observes, name="divides_by_its_statistics"):
    class Observer(Sizes):
        def update(self, x, y):
            super().update(x, y)

        def result(self):
            return {name: 1 / value for name, value in super().result().items()}


@caught_by("calibration_takes_any_rows", r"another layer's observer at work")
class SharesItsObserver(Rich, name="shares_its_observer"):
    _shared: dict[tuple[int, int], Any] = PrivateAttr(default_factory=dict)

    def observe(self, site):
        shape = site.d_in, site.d_out
        if len(self._shared.setdefault(shape, [])) % 2 == 0:
            self._shared[shape].append(Sizes(site.d_in, self.side))
        return self._shared[shape][-1]
