"""ROAD: turn and scale the layer's output in planes of two.

    y'_p = c_p y_p - t_p y_q        c = α cos θ,   t = α sin θ
    y'_q = c_q y_q + t_q y_p        for every pair (p, q) of outputs

    Δy = (c - 1) ⊙ y + t ⊙ rot(y)        rot(y)_p = -y_q,   rot(y)_q = y_p

The outputs are cut into groups of g; position j < g/2 of a group is paired with j + g/2. The bias
is turned with the rest.

    sharing   one θ and one α for                              layout, K = d_out / g groups
    road_1    every pair                                       (K, g/2)
    road_2    every output                                     (K, g)
    road_4    the c and the t of every output, separately      (K, 2, g): [k, 0] feeds c, [k, 1] t

Stored: θ and the offset α - 1, so that weight decay pulls α to 1;
c - 1 = (α - 1) cos θ - 2 sin²(θ/2), without cancellation.

Start: both 0, so Δ is bitwise 0 and both have a gradient. In road_4 the θ that feeds c never moves
(its slope, sin θ, is 0 at the start and stays 0), and the α that feeds t moves from the second step
on. On a weight of zeros nothing has a gradient, ever, unless the layer has a bias.

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation", arXiv:2409.00119. The paper pairs neighbours;
pairs half a group apart follow the common implementation, whose files then fit.
"""

from typing import Annotated, ClassVar, Literal

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import Field
from torch import Tensor

# What `prepare` computes: c - 1 and t, each (K, 1 or 2, g/2).
COSINE_MINUS_1 = "cosine_minus_1"
SINE = "sine"


class ROAD(Variant, name="road"):
    """Rotations and scalings of pairs of outputs.

    Attributes:
        sharing: "road_1" has one angle and scale a pair, "road_2" one an output, "road_4" two an
            output.
        group_size: g, even and a divisor of d_out: outputs g/2 apart make a pair.
    """

    recommended_lr: ClassVar[float] = 1e-2
    acts_on_bias: ClassVar[bool] = True

    sharing: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if site.d_out % self.group_size:
            raise SiteError(
                "group_size",
                f"{self.group_size} does not divide d_out={site.d_out}{_possible(site.d_out)}",
            )
        sizes = {"road_1": site.d_out // 2, "road_2": site.d_out, "road_4": 2 * site.d_out}
        size = (sizes[self.sharing],)
        return {
            "theta": TensorSpec(size, compute="float32"),
            "alpha_offset": TensorSpec(size, compute="float32"),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {name: torch.zeros(spec.shape) for name, spec in self.tensors(site).items()}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        groups, half = site.d_out // self.group_size, self.group_size // 2
        pairs = (groups, 1 if self.sharing == "road_1" else 2, half)
        theta_c, theta_t = self._for_c_and_t(t["theta"])
        offset_c, offset_t = self._for_c_and_t(t["alpha_offset"])
        c_minus_1 = offset_c * torch.cos(theta_c) - 2 * torch.sin(theta_c / 2) ** 2
        sine = (1 + offset_t) * torch.sin(theta_t)
        return {COSINE_MINUS_1: c_minus_1.reshape(pairs), SINE: sine.reshape(pairs)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        groups, half = site.d_out // self.group_size, self.group_size // 2
        pairs = y.reshape(*y.shape[:-1], groups, 2, half)
        p, q = pairs.unbind(-2)
        turned = torch.stack((-q, p), -2)
        delta = t[COSINE_MINUS_1].to(y.dtype) * pairs + t[SINE].to(y.dtype) * turned
        return delta.reshape(y.shape)

    def _for_c_and_t(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers that feed c and those that feed t: the same unless sharing is "road_4"."""
        if self.sharing != "road_4":
            return v, v
        for_c, for_t = v.reshape(-1, 2, self.group_size).unbind(1)
        return for_c, for_t


def _possible(d_out: int) -> str:
    """The group sizes that fit, for an error."""
    fitting = [str(g) for g in range(2, d_out + 1, 2) if d_out % g == 0]
    if not fitting:
        return ", which is odd: outputs cannot be paired"
    return f"; possible are {', '.join(fitting)}"
