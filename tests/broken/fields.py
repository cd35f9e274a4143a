"""Mistakes: fields."""

from typing import Annotated, Any

from broken.sound import Sound, caught_by
from lora_lite.author import SiteError
from pydantic import AfterValidator, ConfigDict


@caught_by("fits_most_draws", r"refuses .* of .* draws")
class RefusesNearlyEverything(Sound, name="refuses_nearly_everything"):
    def tensors(self, site):
        if site.d_in != 12 or self.r != 2:
            raise SiteError("r", "only the shape of my own model")
        return super().tensors(site)


@caught_by("fields_survive_json", r"became halves_its_field")
class HalvesItsField(Sound, name="halves_its_field"):
    strength: Annotated[float, AfterValidator(lambda value: value / 2)] = 1.0


@caught_by("fits_most_draws", r"(?s)refuses .* of .* draws.*an even rank of at least 8")
class ChecksLateWhatItsFieldAllows(Sound, name="checks_late_what_its_field_allows"):
    def tensors(self, site):
        if self.r % 8:
            raise SiteError("r", "expected an even rank of at least 8")
        return super().tensors(site)


@caught_by("fields_survive_json", r"became .*widths=\[1, 2\]")
class HoldsWhatJsonDoesNotHave(Sound, name="holds_what_json_does_not_have"):
    widths: Any = (1, 2)


@caught_by("fields_survive_json", r"unhashable type: 'list'")
class HasAMutableDefault(Sound, name="has_a_mutable_default"):
    gains: list[float] = [1.0]


@caught_by("bad_fields_are_refused", r"no_such_field=1 was accepted")
class IgnoresUnknownFields(Sound, name="ignores_unknown_fields"):
    model_config = ConfigDict(extra="ignore")


@caught_by("bad_fields_are_refused", r"r=True was accepted")
class TakesTextForNumbers(Sound, name="takes_text_for_numbers"):
    model_config = ConfigDict(strict=False)
