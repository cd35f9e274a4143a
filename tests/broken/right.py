"""Variants that are right, each near a mistake or at the edge of a promise."""

from typing import Annotated, ClassVar

import torch
from broken.sound import Sound
from broken.unseen_forward import _ByItself
from broken.unseen_start import _Gain
from lora_lite.author import TensorSpec, Variant
from pydantic import Field, PositiveInt
from torch.nn.functional import dropout

# The promises that a right variant was once thought to break, or could be.
RIGHT: list[tuple[type[Variant], str]] = []


def keeps(*promises: str):
    """The promises to hold a right variant to."""

    def register(cls: type[Variant]) -> type[Variant]:
        RIGHT.extend((cls, promise) for promise in promises)
        return cls

    return register


@keeps(
    "every_parameter_learns_and_nothing_else",
    "every_entry_can_learn",
    "training_mode_adds_dropout_alone",
    "outputs_depend_on_tensors_alone",
    "every_field_changes_something",
    "checks_clean",
)
class DropsOut(Sound, name="drops_out"):
    """Dropout of entries and of whole ranks, in training mode alone; even of the only rank."""

    p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def delta_output(self, site, t, x, y):
        kept = torch.ones(self.r, device=x.device, dtype=x.dtype)
        if site.training:
            kept = torch.bernoulli(kept * (1 - self.p)) / (1 - self.p)
        h = dropout(x, self.p, site.training) @ t["A"].T
        return self.gain * ((kept * h) @ t["B"].T)


@keeps(
    "gradients_agree_with_finite_differences",
    "computes_where_its_tensors_are",
    "deltas_write_nothing",
    "scale_fades_from_base_to_adapter",
    "macs_are_as_declared",
)
class ScalesByItself(_ByItself, name="scales_by_itself"):
    """Takes the scale, and has no `prepare`."""

    def delta_output(self, site, t, x, y, *, scale=1.0):
        return scale * (x @ t["A"].T @ t["B"].T)


@keeps("weight_decay_keeps_the_start", "bias_goes_through")
class KeepsItsGain(_Gain, name="keeps_its_gain"):
    """The gain does not decay."""

    decay: ClassVar[bool] = False


@keeps("upgrade_keeps_the_fields", "save_and_load_are_bitwise")
class UpgradesAllFields(Sound, name="upgrades_all_fields"):
    """Format 1 had called the gain `scaling`, and the tensors as another library does."""

    format: ClassVar[int] = 2

    @classmethod
    def upgrade(cls, fields, tensors, from_format):
        fields = dict(fields)
        if "scaling" in fields:
            fields["gain"] = fields.pop("scaling")
        return fields, {"A": tensors["lora_A"], "B": tensors["lora_B"]}


@keeps("macs_are_as_declared")
class WritesEinsums(Sound, name="writes_einsums"):
    """torch makes no matrix product of an einsum over one rank."""

    def delta_output(self, site, t, x, y):
        h = torch.einsum("...i,ri->...r", x, t["A"])
        return self.gain * torch.einsum("...r,or->...o", h, t["B"])


@keeps(
    "every_parameter_learns_and_nothing_else",
    "every_entry_can_learn",
    "learns_what_it_can_express",
    "checks_clean",
)
class MixesItsRanks(Sound, name="mixes_its_ranks"):
    """A softmax over k scales: a constant where k is 1."""

    k: PositiveInt = 2

    def tensors(self, site):
        return {**super().tensors(site), "w": TensorSpec((self.k,), decay=False)}

    def init(self, site, derived, statistics, rng):
        return {**super().init(site, derived, statistics, rng), "w": torch.zeros(self.k)}

    def delta_output(self, site, t, x, y):
        sizes = torch.arange(1, self.k + 1, device=x.device, dtype=x.dtype)
        return (t["w"].softmax(0) * sizes).sum() * super().delta_output(site, t, x, y)


@keeps("every_entry_can_learn", "every_parameter_learns_and_nothing_else")
class TurnsByASkewMatrix(Sound, name="turns_by_a_skew_matrix"):
    """Δy = A (S - Sᵀ) Aᵀ-like: the diagonal of S has no part in it."""

    def tensors(self, site):
        return {**super().tensors(site), "S": TensorSpec((self.r, self.r))}

    def init(self, site, derived, statistics, rng):
        values = super().init(site, derived, statistics, rng)
        return {**values, "S": torch.zeros(self.r, self.r)}

    def delta_output(self, site, t, x, y):
        h = x @ t["A"].T
        turned = h + h @ (t["S"] - t["S"].T)
        return self.gain * (turned @ t["B"].T)
