"""Mistakes: calibration."""

import torch
from broken.sound import Rich, Sizes, caught_by


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
