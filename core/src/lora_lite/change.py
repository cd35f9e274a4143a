"""What an adapter changes at one layer, as a function of the layer's input.

    change(x) = W Δx + Δy(x', W x' + b),        x' = x + Δx

The base's output is never subtracted, so nothing is lost to rounding. The layer is seen in eval
mode, without autocast, and as if this were its only adapter. Nothing of the model is touched.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lite.attachment import Attachment
from lora_lite.errors import AdapterError
from lora_lite.experts import ExpertStack, SingleMatrix
from lora_lite.per_expert import expert_spec
from lora_lite.site import LayerSpec, Site


class LayerChange:
    """The change at one layer, by an adapter at its present scale.

    Attributes:
        site: the layer.
        variant: the name of the variant there.
        device: where the layer is.
    """

    def __init__(self, attachment: Attachment, module: nn.Module) -> None:
        # A shallow copy has the same tensors, and a training mode of its own.
        self._module = copy.copy(module)
        self._module.training = False
        self._attachment = attachment
        self.site = Site(attachment.layer, self._module)
        self.variant = attachment.variant.name
        self.device = next(iter(attachment.stored(module).values())).device

    @property
    def is_at_input(self) -> bool:
        """Whether the layer's input is changed, so that the change goes through W."""
        return self._attachment.has_input_delta

    def __call__(self, x: Tensor, w_x: Tensor | None = None) -> Tensor:
        """The change of y for rows of inputs.

        Args:
            x: (rows, d_in), in the dtype to compute in.
            w_x: W x for these rows, (rows, d_out), where it is known already.

        Returns:
            (rows, d_out), in x's dtype.
        """
        attachment, site = self._attachment, self.site
        changed = x.new_zeros(len(x), site.d_out)
        with torch.autocast(x.device.type, enabled=False):
            if attachment.has_input_delta:
                delta = attachment.input_delta(self._module, x)
                x = x + delta
                changed = site.matmul(delta)
                w_x = None if w_x is None else w_x + changed
            if attachment.has_output_delta:
                y = site.matmul(x) if w_x is None else w_x
                if site.has_bias:
                    y = y + site.bias().to(y.dtype)
                changed = changed + attachment.output_delta(self._module, x, y)
        return changed


def changes_at(attachment: Attachment, module: nn.Module) -> Iterator[LayerChange]:
    """The change at a layer; of a stack of experts, that of each of them, at `path[e]`.

    Raises:
        AdapterError: the module has no weight matrix.
    """
    kind = attachment.layer.kind
    if not kind.has_matrix:
        raise AdapterError(
            f"{attachment.layer.path} ({type(module).__name__}) has no weight matrix, so its "
            "change is no matrix either",
            fix="save(path, format='merged') writes its parameters; save(path) keeps the adapter",
            layer=attachment.layer.path,
        )
    if isinstance(kind, ExpertStack):
        for expert in range(kind.count(module)):
            yield _change_of_expert(attachment, module, expert)
    else:
        yield LayerChange(attachment, module)


def _change_of_expert(attachment: Attachment, module: nn.Module, expert: int) -> LayerChange:
    """One expert as the linear layer that it is, with an adapter of its own."""
    kind = attachment.layer.kind
    assert isinstance(kind, ExpertStack)
    alone = nn.Module()
    alone.register_parameter("weight", nn.Parameter(kind.stacked(module)[expert], False))
    one = expert_spec(attachment.layer, expert)
    layer = LayerSpec(one.path, SingleMatrix(), one.d_in, one.d_out, has_bias=False)
    specs = {name: replace(spec, shape=spec.shape[1:]) for name, spec in attachment.specs.items()}
    own = Attachment(attachment.state, layer, attachment.variant, specs)
    for name, stack in attachment.stored(module).items():
        tensor = nn.Parameter(stack.detach()[expert], requires_grad=False)
        alone.register_parameter(own.keys[name], tensor)
    return LayerChange(own, alone)
