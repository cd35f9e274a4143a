"""Mistakes: start."""

from typing import Any, ClassVar

import torch
from broken.sound import Sound, caught_by
from lora_lite.author import Site, TensorSpec
from torch import Tensor


@caught_by("start_matches_identity", r"identity 'exact'")
class StartsOffTheBase(Sound, name="starts_off_the_base"):
    def init(self, site, derived, statistics, rng):
        return {
            **super().init(site, derived, statistics, rng),
            "B": torch.full((site.d_out, self.r), 1e-3),
        }


@caught_by("start_matches_identity", r"identity 'exact'")
class RoundsWhereItSaysExact(Sound, name="rounds_where_it_says_exact"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        return (y * 1.1 + delta) - y / 3 * 3.3


@caught_by("start_matches_identity", r"shapes cannot be multiplied")
class RightForSquareLayersOnly(Sound, name="right_for_square_layers_only"):
    def tensors(self, site):
        return {**super().tensors(site), "A": TensorSpec((self.r, site.d_out))}

    def init(self, site, derived, statistics, rng):
        return {
            "A": torch.randn(self.r, site.d_out, generator=rng("A")),
            "B": torch.zeros(site.d_out, self.r),
        }


@caught_by("start_is_not_better_than_declared", r"zero_start=True\) declares identity 'none', yet")
class ExcusesItselfForAllFields(Sound, name="excuses_itself_for_all_fields"):
    zero_start: bool = True

    @property
    def identity(self):
        return "none"

    def init(self, site, derived, statistics, rng):
        b = (
            torch.zeros(site.d_out, self.r)
            if self.zero_start
            else torch.randn(site.d_out, self.r, generator=rng("B"))
        )
        return {**super().init(site, derived, statistics, rng), "B": b}


@caught_by("start_is_not_better_than_declared", r"declares identity 'none'")
class ExcusesItselfFromTheStart(Sound, name="excuses_itself_from_the_start"):
    @property
    def identity(self):
        return "none"


@caught_by("only_declared_tensors_appear", r"undeclared: .*last_norm")
class CachesOnTheModule(Sound, name="caches_on_the_module"):
    def delta_output(self, site, t, x, y):
        site._module.last_norm = x.detach().norm()
        return super().delta_output(site, t, x, y)


@caught_by("only_declared_tensors_appear", r"undeclared: .*extra")
class AddsAParameterByItself(Sound, name="adds_a_parameter_by_itself"):
    def init(self, site, derived, statistics, rng):
        site._module.extra = torch.nn.Parameter(torch.zeros(site.d_out))
        return super().init(site, derived, statistics, rng)


@caught_by("parameters_are_as_counted", r"meta")
class ChoosesItsRankByTheWeights(Sound, name="chooses_its_rank_by_the_weights"):
    def tensors(self, site):
        r = int((torch.linalg.svdvals(site.weight()) > 1).sum())
        return {"A": TensorSpec((r, site.d_in)), "B": TensorSpec((site.d_out, r))}


@caught_by("parameters_are_as_counted", r"meta")
class CountsFromTheWeights(Sound, name="counts_from_the_weights"):
    def macs_per_token(self, site):
        return self.r * int(site.weight().count_nonzero() / site.d_in + site.d_in)


@caught_by(
    "start_depends_on_seed_path_and_name_alone",
    r"start values of the same seed: .*A: expected the same bits",
)
class DrawsGlobally(Sound, name="draws_globally"):
    def init(self, site, derived, statistics, rng):
        return {**super().init(site, derived, statistics, rng), "A": torch.randn(self.r, site.d_in)}


@caught_by("start_depends_on_seed_path_and_name_alone", r"init draws")
class DrawsTheSameForEverySeed(Sound, name="draws_the_same_for_every_seed"):
    def init(self, site, derived, statistics, rng):
        rng("A")
        fixed = torch.Generator().manual_seed(0)
        return {
            **super().init(site, derived, statistics, rng),
            "A": torch.randn(self.r, site.d_in, generator=fixed),
        }


@caught_by("attach_leaves_the_random_state", r"random state after attach")
class MakesAThrowawayLayer(Sound, name="makes_a_throwaway_layer"):
    def init(self, site, derived, statistics, rng):
        torch.nn.Linear(site.d_in, self.r)
        return super().init(site, derived, statistics, rng)


class _Derives(Sound):
    def tensors(self, site):
        return {
            **super().tensors(site),
            "U": TensorSpec((site.d_out, 1), trainable=False, derived=True),
        }


@caught_by("derived_tensors_come_again", r"U, derived with other signs of a decomposition")
class LeavesSignsToTheMachine(_Derives, name="leaves_signs_to_the_machine"):
    def derive(self, site):
        return {"U": torch.linalg.svd(site.weight(), full_matrices=False).U[:, :1]}


@caught_by("derived_tensors_come_again", r"U, derived with other signs of a decomposition")
class LeavesSignsOfTheGramMatrix(_Derives, name="leaves_signs_of_the_gram_matrix"):
    def derive(self, site):
        return {
            "U": torch.linalg.eigh(site.matmul(site.weight())).eigenvectors[
                :, [-min(site.d_in, site.d_out)]
            ]
        }


@caught_by("derived_tensors_come_again", r"P, derived on a copy")
class DerivesByPlace(Sound, name="derives_by_place"):
    def tensors(self, site):
        return {
            **super().tensors(site),
            "P": TensorSpec((site.d_in,), trainable=False, derived=True),
        }

    def derive(self, site):
        return {"P": site.weight().norm(dim=0) * (1 + id(site._module) % 9973)}


@caught_by("derived_tensors_come_again", r"derive, called again: P")
class DerivesAtRandom(Sound, name="derives_at_random"):
    def tensors(self, site):
        return {**super().tensors(site), "P": TensorSpec((self.r,), trainable=False, derived=True)}

    def derive(self, site):
        return {"P": torch.rand(self.r)}


@caught_by("adapter_is_freed", r"modules of a deleted model with an adapter are still held")
class KeepsAClosure(Sound, name="keeps_a_closure"):
    undo: ClassVar[list[Any]] = []

    def init(self, site, derived, statistics, rng):
        self.undo.append(lambda: site.weight())
        return super().init(site, derived, statistics, rng)


@caught_by("adapter_is_freed", r"tensors of a detached adapter are still held")
class KeepsTheLastTensors(Sound, name="keeps_the_last_tensors"):
    last: ClassVar[dict[str, Tensor]] = {}

    def penalty(self, site, t):
        return sum(p.square().mean() for p in self.last.values()) if self.last else None

    def delta_output(self, site, t, x, y):
        self.last.update(t)
        return super().delta_output(site, t, x, y)


@caught_by("adapter_is_freed", r"are still held")
class KeepsItsSites(Sound, name="keeps_its_sites"):
    sites_seen: ClassVar[list[Site]] = []

    def init(self, site, derived, statistics, rng):
        self.sites_seen.append(site)
        return super().init(site, derived, statistics, rng)
