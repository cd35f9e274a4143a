"""Models that are prepared for several processes already: nothing may be attached or detached."""

import gc
import sys

import torch
from torch import nn

from lora_lite.errors import AdapterError
from lora_lite.layers import is_dtensor

REASON = "Gradients of the adapter would silently not be reduced over the processes"


def refuse_wrapped(root: nn.Module) -> None:
    """An error for a model that DDP, FSDP1 or FSDP2 has prepared already."""
    wrapper = _wrapper_of(root)
    if wrapper:
        raise AdapterError(
            f"the model {wrapper}",
            expected=REASON,
            fix="Attach, load and detach before the model is wrapped or sharded",
        )


def _wrapper_of(root: nn.Module) -> str:
    """What has prepared a model for several processes, as the end of a sentence; "" if nothing."""
    if isinstance(root, nn.parallel.DistributedDataParallel):
        return "is wrapped in DistributedDataParallel"
    if "torch.distributed.tensor" in sys.modules and any(map(is_dtensor, root.parameters())):
        return "has sharded parameters (FSDP2, DTensor)"
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    if any(_is_fsdp1(module) for module in root.modules()):
        return "is wrapped in FullyShardedDataParallel (FSDP1)"
    if _inside_ddp(root):
        return "is wrapped in DistributedDataParallel already: this is its inner module"
    return ""


def _is_fsdp1(module: nn.Module) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"


def _inside_ddp(root: nn.Module) -> bool:
    """Whether a DDP holds this model. It leaves no trace there, so all DDPs are looked at."""
    ddp = nn.parallel.DistributedDataParallel
    wrappers = [each for each in gc.get_objects() if isinstance(each, ddp)]
    return any(root is module for wrapper in wrappers for module in wrapper.modules())
