"""A mistake whose failure does not come again."""

from typing import ClassVar

from broken.sound import Sound


class FailsOnce(Sound, name="fails_once"):
    """The third forward of the process is wrong."""

    calls: ClassVar[list[int]] = [0]

    def delta_output(self, site, t, x, y):
        self.calls[0] += 1
        wrong = self.calls[0] == 3
        return super().delta_output(site, t, x, y) * (2 if wrong else 1)
