"""The experts of a mixture under PEFT's names. `read_experts` has the table of how they lie."""

from lora_lite.experts import expert_stacks
from torch import Tensor

from lora_lite_peft.files import PREFIX
from lora_lite_peft.parts import Part

# The version of PEFT from which on a config means this layout.
LAYOUT = "0.19.1"


def expert_tensors(adapter: Part, path: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """lora_A (E · r, d_in) and lora_B (d_out, r · E).

    PEFT wraps the module once for each parameter, in the module's order, and the tensors of all but
    the last lie under one `base_layer` more.

    Args:
        adapter: what is written.
        path: of the parameter.
        a: (E, r, d_in).
        b: (E, d_out, r).
    """
    module = adapter.adapter._modules[path]
    holder, _, own = path.rpartition(".")
    written = [n for n in module._parameters if f"{holder}.{n}" in adapter.sites]
    depth = len(written) - 1 - written.index(own)
    stack = expert_stacks(module)[own]
    if bool(getattr(module, "is_transposed", False)) != stack.is_transposed:
        a, b = b.mT, a.mT  # PEFT takes them for experts that lie the other way round
    name = f"{PREFIX}{holder}{'.base_layer' * depth}"
    return {
        f"{name}.lora_A.weight": a.flatten(0, 1),
        f"{name}.lora_B.weight": b.permute(1, 2, 0).flatten(1),
    }
