"""Full: train a layer's own parameters, whatever the layer is.

    Δy = M(x; θ') - M(x; θ)

For a layer with a weight matrix, y = W x + b, only the change is multiplied:

    Δy = (W' - W) x + (b' - b)

so that a new adapter, whose W' is W, adds exactly 0. Modules without a weight matrix, such as
norms, run a second time with θ' in place of θ.

θ' is stored as it is, and not as its distance from θ. So it does not matter what θ was: the head of
a classifier, which is random again whenever the base is loaded, comes back as it was trained.

Training the biases alone is BitFit: Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199.
"""

from typing import ClassVar, Literal

from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from torch import Tensor
from torch.nn.functional import linear


class Full(Variant, name="full"):
    """New parameters in place of a layer's own.

    Attributes:
        only: "bias" trains the parameter of this name alone; None trains all.
    """

    recommended_lr: ClassVar[float] = 1e-4
    acts_on_bias: ClassVar[bool] = True
    replaces_weights: ClassVar[bool] = True

    only: Literal["bias"] | None = None

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shapes = _shapes(site)
        chosen = [name for name in shapes if self.only in (None, name)]
        if not chosen:
            raise SiteError("only", f"there is no {self.only!r} here, but {', '.join(shapes)}")
        # Weight decay would pull to 0, and not to the base.
        return {name: TensorSpec(shapes[name], decay=False, compute="float32") for name in chosen}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {name: _own(site, name) for name in self.tensors(site)}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        if not site.has_matrix:
            return {}
        return {
            f"change of {name}": t[name] - _own(site, name).to(t[name].dtype)
            for name in self.tensors(site)
        }

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        if not site.has_matrix:
            return site.output(x, t) - y
        bias = t["change of bias"].to(y.dtype) if "bias" in t else None
        if "weight" in t:
            return linear(x, t["change of weight"].to(y.dtype), bias)
        assert bias is not None
        return bias.expand_as(y)

    def macs_per_token(self, site: Site) -> int:
        multiplies = site.has_matrix and not site.reads_ids and self.only != "bias"
        return site.d_in * site.d_out if multiplies else 0


def _shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, without reading a weight that may be quantised."""
    if site.has_matrix:
        bias = {"bias": (site.d_out,)} if site.has_bias else {}
        return {"weight": (site.d_out, site.d_in), **bias}
    own = site.parameters()
    for name, parameter in own.items():
        if parameter.ndim == 0 or not parameter.is_floating_point():
            kind = f"a {parameter.dtype} with {parameter.ndim} dimensions"
            raise SiteError("only", f"the parameter {name!r} cannot be trained: it is {kind}")
    return {name: tuple(parameter.shape) for name, parameter in own.items()}


def _own(site: Site, name: str) -> Tensor:
    """One of the layer's own parameters."""
    if not site.has_matrix:
        return site.parameters()[name]
    return site.weight() if name == "weight" else site.bias()
