"""Mistakes in what an adapter starts from."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from broken.sound import Sound, caught_by
from lora_lite.author import TensorSpec
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import dropout


@caught_by("start_matches_identity", r"identity is 'excat'")
class MisspellsIdentity(Sound, name="misspells_identity"):
    @property
    def identity(self):
        return "excat"


@caught_by("start_matches_identity", r"identity 'exact'")
class StartsOffTheBaseAboveRankEight(Sound, name="starts_off_the_base_above_rank_eight"):
    def init(self, site, derived, statistics, rng):
        values = super().init(site, derived, statistics, rng)
        values["B"][:, 8:] = 1e-3
        return values


class _Gain(Sound):
    """Δy = B A x + (g - 1) ⊙ y, with g stored as it is."""

    decay: ClassVar[bool] = True
    acts_on_bias: ClassVar[bool] = True

    def tensors(self, site):
        return {**super().tensors(site), "g": TensorSpec((site.d_out,), decay=self.decay)}

    def init(self, site, derived, statistics, rng):
        return {**super().init(site, derived, statistics, rng), "g": torch.ones(site.d_out)}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) + (t["g"] - 1) * y


@caught_by("weight_decay_keeps_the_start", r"decaying tensors halved, against the base")
class DecaysItsGain(_Gain, name="decays_its_gain"):
    pass


@caught_by("weight_decay_keeps_the_start", r"decaying tensors halved, against the base")
class DecaysItsPrincipalPart(Sound, name="decays_its_principal_part"):
    """W' = W + A - A0, A starting at A0, a part of the weight."""

    def tensors(self, site):
        shape = (site.d_out, site.d_in)
        return {"A": TensorSpec(shape), "A0": TensorSpec(shape, trainable=False)}

    def init(self, site, derived, statistics, rng):
        return {"A": site.weight().float(), "A0": site.weight().float()}

    def delta_output(self, site, t, x, y):
        return self.gain * x @ (t["A"] - t["A0"]).T

    def macs_per_token(self, site):
        return site.d_in * site.d_out


@caught_by("attach_leaves_the_random_state", r"attach changed .*float32.* to .*float64")
class SetsTheDefaultDtype(Sound, name="sets_the_default_dtype"):
    def init(self, site, derived, statistics, rng):
        torch.set_default_dtype(torch.float64)
        return super().init(site, derived, statistics, rng)


@caught_by("attach_leaves_the_random_state", r"numpy's global random state")
class DrawsFromNumpy(Sound, name="draws_from_numpy"):
    def init(self, site, derived, statistics, rng):
        a = torch.from_numpy(np.random.randn(self.r, site.d_in))
        return {**super().init(site, derived, statistics, rng), "A": a}


@caught_by("start_depends_on_seed_path_and_name_alone", r"A and .*C start with the same numbers")
class GivesTwoTensorsOneStream(Sound, name="gives_two_tensors_one_stream"):
    """Two down-projections that start alike, and so stay alike."""

    def tensors(self, site):
        return {**super().tensors(site), "C": TensorSpec((self.r, site.d_in))}

    def init(self, site, derived, statistics, rng):
        values = super().init(site, derived, statistics, rng)
        return {**values, "C": torch.randn(self.r, site.d_in, generator=rng("A"))}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, {**t, "A": t["A"] + t["C"]}, x, y)


@caught_by("another_process_agrees", r"start values in another process: .*A")
class SeedsFromAHash(Sound, name="seeds_from_a_hash"):
    def init(self, site, derived, statistics, rng):
        generator = torch.Generator().manual_seed(hash(site.path) % 2**31)
        a = torch.randn(self.r, site.d_in, generator=generator)
        return {**super().init(site, derived, statistics, rng), "A": a}


class _Derived(Sound):
    """Δy = g ⊙ B A (P ⊙ x), with a frozen P from the base."""

    def tensors(self, site):
        spec = TensorSpec((site.d_in,), trainable=False, derived=True)
        return {**super().tensors(site), "P": spec}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x * t["P"], y)


@caught_by("another_process_agrees", r"start values in another process: .*P")
class DerivesFromAHash(_Derived, name="derives_from_a_hash"):
    def derive(self, site):
        generator = torch.Generator().manual_seed(hash(str(site.d_in)) % 2**31)
        return {"P": torch.rand(site.d_in, generator=generator)}


@caught_by("another_process_agrees", r"start values in another process: .*P")
class CachesByShape(_Derived, name="caches_by_shape"):
    """The second layer of a shape gets what was derived from the first, of another model even."""

    cache: ClassVar[dict[tuple[int, int], Tensor]] = {}

    def derive(self, site):
        shape = site.d_in, site.d_out
        return {"P": self.cache.setdefault(shape, site.weight().float().norm(dim=0))}


@caught_by("upgrade_keeps_the_fields", r"drops gain=")
class UpgradesSomeFields(Sound, name="upgrades_some_fields"):
    format: ClassVar[int] = 2

    @classmethod
    def upgrade(cls, fields, tensors, from_format):
        return {"r": fields["r"]}, tensors


@caught_by("every_field_changes_something", r"'alpha' changes nothing")
class HasAFieldLeftOver(Sound, name="has_a_field_left_over"):
    alpha: PositiveFloat = 16.0


@caught_by("every_field_changes_something", r"'rslora' changes nothing: (True, False|False, True)")
class HasTwoBranchesAlike(Sound, name="has_two_branches_alike"):
    rslora: bool = False

    def delta_output(self, site, t, x, y):
        scale = self.r**-1.0 if self.rslora else 1 / self.r
        return scale * super().delta_output(site, t, x, y)


@caught_by("every_field_changes_something", r"'p' changes nothing")
class NeverDropsOut(Sound, name="never_drops_out"):
    p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, dropout(x, self.p, training=False), y)


@caught_by("every_tensor_is_read", r"declares \['m'\]")
class HasATensorThatNothingReads(Sound, name="has_a_tensor_that_nothing_reads"):
    def tensors(self, site):
        return {**super().tensors(site), "m": TensorSpec((site.d_in,), trainable=False)}

    def init(self, site, derived, statistics, rng):
        return {**super().init(site, derived, statistics, rng), "m": torch.ones(site.d_in)}


@caught_by("start_depends_on_seed_path_and_name_alone", r"\['A'\] from a generator of its own")
class DrawsAsPublished(Sound, name="draws_as_published"):
    """Every layer starts alike, because the paper's code says `seed=0`."""

    def init(self, site, derived, statistics, rng):
        own = torch.Generator().manual_seed(0)
        return {
            "A": torch.empty(self.r, site.d_in).normal_(generator=own),
            "B": torch.zeros(site.d_out, self.r),
        }
