"""Mistakes: base."""

from broken.sound import Sound, caught_by


@caught_by("base_is_untouched", r"base tensor .*layer.weight after attach")
class NormalisesTheBase(Sound, name="normalises_the_base"):
    def init(self, site, derived, statistics, rng):
        site.weight().div_(1.01)
        return super().init(site, derived, statistics, rng)


@caught_by("base_is_untouched", r"base tensor .*layer.weight after training")
class WritesTheBaseInTraining(Sound, name="writes_the_base_in_training"):
    def project(self, site, t):
        site.weight().add_(1e-3)


@caught_by("base_is_untouched", r"_forward_hooks")
class LeavesAHook(Sound, name="leaves_a_hook"):
    def init(self, site, derived, statistics, rng):
        site._module.register_forward_hook(lambda *_: None)
        return super().init(site, derived, statistics, rng)
