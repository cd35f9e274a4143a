"""Mistakes: files."""

from typing import ClassVar

import torch
from broken.sound import Sound, caught_by
from lora_lite.author import TensorSpec
from pydantic import PrivateAttr


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


@caught_by("another_process_agrees", r"output of another process")
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
