"""What an adapter changes at one layer, as a function of the layer's input.

    change(x) = W Δx + Δy(x', W x' + b),        x' = x + Δx

The base's output is never subtracted, so nothing is lost to rounding. The layer is seen in eval
mode, without autocast, and as if this were its only adapter. Nothing of the model is touched.
"""

import copy

import torch
from torch import Tensor, nn

from lora_lite.errors import AdapterError
from lora_lite.experts import ExpertStack
from lora_lite.hooks import Attachment
from lora_lite.site import Site


def refuse_experts(attachment: Attachment) -> None:
    """An error for an adapter on the experts of a mixture, which are many layers in one."""
    if isinstance(attachment.layer.kind, ExpertStack):
        raise AdapterError(
            f"{attachment.layer.path} holds the experts of a mixture; their changes cannot be "
            "written as factors or merged yet",
            fix="adapter.save(path) keeps them in lora-lite's own format",
            layer=attachment.layer.path,
        )


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
