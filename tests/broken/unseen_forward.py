"""Mistakes in a forward that small layers, ordinary numbers or eval mode do not show."""

from typing import ClassVar

import torch
from broken.sound import Sound, caught_by
from lora_lite.author import ScaledVariant, TensorSpec
from pydantic import PositiveInt, PrivateAttr

# --- mode and state


@caught_by("training_mode_adds_dropout_alone", r"output: ")
class DoublesInTraining(Sound, name="doubles_in_training"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * (2 if site.training else 1)


@caught_by("training_mode_adds_dropout_alone", r"gradient by .*A")
class DetachesInTraining(Sound, name="detaches_in_training"):
    def delta_output(self, site, t, x, y):
        a = t["A"].detach() + 0 * t["A"] if site.training else t["A"]
        return super().delta_output(site, {**t, "A": a}, x, y)


@caught_by("outputs_depend_on_tensors_alone", r"a model's output after")
class AveragesInTraining(Sound, name="averages_in_training"):
    """Batch normalisation with its running mean on the object."""

    _mean: float = PrivateAttr(default=1.0)

    def delta_output(self, site, t, x, y):
        if site.training:
            self._mean = 0.9 * self._mean + 0.1 * float(x.detach().abs().mean())
        return super().delta_output(site, t, x, y) * self._mean


@caught_by("compiles_whole_and_once", r"[Dd]ata-dependent")
class LooksAtAValueInTraining(Sound, name="looks_at_a_value_in_training"):
    def delta_output(self, site, t, x, y):
        if site.training and float(t["B"].detach().abs().max()) > 1e9:
            raise ValueError("diverged")
        return super().delta_output(site, t, x, y)


@caught_by("outputs_depend_on_tensors_alone", r"random state after a forward in eval mode")
class DrawsAndForgets(Sound, name="draws_and_forgets"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x + 0 * torch.randn_like(x), y)


@caught_by("path_is_not_read_in_a_forward", r"site.path")
class ReadsThePath(Sound, name="reads_the_path"):
    def delta_output(self, site, t, x, y):
        depth = 1 + site.path.count("no_such_part")
        return super().delta_output(site, t, x, y) * depth


@caught_by("path_is_not_read_in_a_forward", r"site.path")
class PreparesByPath(Sound, name="prepares_by_path"):
    def prepare(self, site, t):
        return {"factor": torch.ones_like(t["A"][0, :1]) * len(str(site)) / len(str(site))}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) * t["factor"]


@caught_by("gradients_agree_with_finite_differences", r"\['?B'?\]|'B'")
class ShadowsATensor(Sound, name="shadows_a_tensor"):
    def prepare(self, site, t):
        return {"B": self.gain * t["B"]}

    def delta_output(self, site, t, x, y):
        return x @ t["A"].T @ t["B"].T


@caught_by("gradients_agree_with_finite_differences", r"nrom")
class MisspellsDetached(Sound, name="misspells_detached"):
    detached: ClassVar[tuple[str, ...]] = ("nrom",)

    def prepare(self, site, t):
        return {"norm": t["A"].norm() + 1}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) / t["norm"]


@caught_by("outputs_depend_on_tensors_alone", r"a forward changed .*'highest'.*'medium'")
class SetsThePrecision(Sound, name="sets_the_precision"):
    def delta_output(self, site, t, x, y):
        torch.set_float32_matmul_precision("medium")
        return super().delta_output(site, t, x, y)


class _ByItself(ScaledVariant):
    """Δy = f(s) B A x, with a scale of its own."""

    r: PositiveInt = 2

    tensors = Sound.tensors
    init = Sound.init
    macs_per_token = Sound.macs_per_token


@caught_by("scale_fades_from_base_to_adapter", r"the output at scale -1: .*not finite")
class TakesARootOfTheScale(_ByItself, name="takes_a_root_of_the_scale"):
    def delta_output(self, site, t, x, y, *, scale=1.0):
        return torch.full_like(x[..., :1], scale).sqrt() * (x @ t["A"].T @ t["B"].T)


# --- numbers


@caught_by("zeros_give_finite_numbers", r"a token that is zero: .*not finite")
class DividesByTheNormOfX(Sound, name="divides_by_the_norm_of_x"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x / x.norm(dim=-1, keepdim=True), y)


@caught_by("zeros_give_finite_numbers", r"gradient by x for a token that is zero")
class TakesARootOfSquares(Sound, name="takes_a_root_of_squares"):
    def delta_output(self, site, t, x, y):
        size = x.square().sum(-1, keepdim=True).sqrt()
        return super().delta_output(site, t, x, y) / (1 + size)


@caught_by("zeros_give_finite_numbers", r"a base with a row of zeros|not finite")
class DividesByRowNorms(Sound, name="divides_by_row_norms"):
    def tensors(self, site):
        spec = TensorSpec((site.d_out,), trainable=False, derived=True)
        return {**super().tensors(site), "n": spec}

    def derive(self, site):
        return {"n": site.weight().norm(dim=1)}

    def delta_output(self, site, t, x, y):
        return super().delta_output(site, t, x, y) / t["n"]


@caught_by("large_activations_stay_finite", r"in torch.float16 the change is off by")
class SquaresInHalf(Sound, name="squares_in_half"):
    def delta_output(self, site, t, x, y):
        size = (x * x).sum(-1, keepdim=True)
        return super().delta_output(site, t, x, y) / (1 + size)


@caught_by("large_activations_stay_finite", r"not finite")
class TakesTheExponentialOfX(Sound, name="takes_the_exponential_of_x"):
    def delta_output(self, site, t, x, y):
        gate = torch.exp(x.float()).to(x.dtype)
        return super().delta_output(site, t, x / (1 + gate), y)


@caught_by("large_activations_stay_finite", r"not finite")
class WritesOutSoftmax(Sound, name="writes_out_softmax"):
    def delta_output(self, site, t, x, y):
        weights = torch.exp(x.float()) / torch.exp(x.float()).sum(-1, keepdim=True)
        return super().delta_output(site, t, x * weights.to(x.dtype), y)


@caught_by("half_precision_keeps_the_change", r"in torch.bfloat16 the change is off by")
class SubtractsYAgain(Sound, name="subtracts_y_again"):
    def delta_output(self, site, t, x, y):
        return (100 * y + super().delta_output(site, t, x, y)) - 100 * y

    @property
    def identity(self):
        return "rounding"


# --- sizes


@caught_by("every_entry_can_learn", r"these entries have no gradient")
class PairsItsRanks(Sound, name="pairs_its_ranks"):
    """Two ranks at a time: the last of an odd number is forgotten."""

    def delta_output(self, site, t, x, y):
        even = max(1, self.r // 2 * 2)
        t = {**t, "A": t["A"][:even], "B": t["B"][:, :even]}
        return super().delta_output(site, t, x, y)


@caught_by("every_entry_can_learn", r"these entries have no gradient")
class PairsItsInputs(Sound, name="pairs_its_inputs"):
    def delta_output(self, site, t, x, y):
        even = site.d_in // 2 * 2
        return super().delta_output(site, {**t, "A": t["A"][:, :even]}, x[..., :even], y)


@caught_by("every_entry_can_learn", r"these entries have no gradient")
class HasEightRanksAtMost(Sound, name="has_eight_ranks_at_most"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, {**t, "A": t["A"][:8], "B": t["B"][:, :8]}, x, y)


@caught_by("every_entry_can_learn", r"these entries have no gradient")
class LooksAtThirtyTwoInputs(Sound, name="looks_at_thirty_two_inputs"):
    def delta_output(self, site, t, x, y):
        return super().delta_output(site, {**t, "A": t["A"][:, :32]}, x[..., :32], y)


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"the end of 1100 tokens")
class LooksAtThirtyTwoTokens(Sound, name="looks_at_thirty_two_tokens"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        if x.ndim > 2 and x.shape[-2] > 32:
            delta = torch.cat([delta[..., :32, :], 0 * delta[..., 32:, :]], -2)
        return delta


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"the end of 1100 tokens")
class LooksAtFiveHundredTokens(Sound, name="looks_at_five_hundred_tokens"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        return delta if x[..., 0].numel() <= 512 else 0 * delta


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"one token of one row")
class DoublesWhileGenerating(Sound, name="doubles_while_generating"):
    def delta_output(self, site, t, x, y):
        delta = super().delta_output(site, t, x, y)
        return 2 * delta if x.shape[:-1] == (1, 1) else delta


@caught_by("batch_is_its_rows_and_sequence_its_tokens", r"the end of 1100 tokens")
class LooksAtSixtyFourRows(Sound, name="looks_at_sixty_four_rows"):
    def delta_output(self, site, t, x, y):
        rows = super().delta_output(site, t, x, y).reshape(-1, site.d_out)
        return torch.cat([rows[:64], 0 * rows[64:]]).reshape(y.shape)


@caught_by("gradients_agree_with_finite_differences", r"gradient by A along a random direction")
class DetachesInLargeLayers(Sound, name="detaches_in_large_layers"):
    def delta_output(self, site, t, x, y):
        norm = t["A"].norm()
        norm = norm.detach() if site.d_in > 32 else norm
        return super().delta_output(site, t, x, y) / (1 + norm)


@caught_by("macs_are_as_declared", r"declared .* counted")
class CountsSmallLayersAlone(Sound, name="counts_small_layers_alone"):
    def macs_per_token(self, site):
        return self.r * (min(site.d_in, 32) + min(site.d_out, 32))


# --- kinds of layers


@caught_by("other_kinds_compute_the_same", r"on Embedding, against the linear layer")
class ReadsTheModule(Sound, name="reads_the_module"):
    """The rows' lengths of what the module calls its weight, which are the columns' elsewhere."""

    def delta_output(self, site, t, x, y):
        weight = site._module.weight
        return super().delta_output(site, t, x, y) * weight.detach().to(y.dtype)[0].norm()
