"""Models that are prepared for several processes already: nothing may be attached or detached."""

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_lite.attachment import AdapterState
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


def refuse_unreduced(root: nn.Module, states: Iterable[AdapterState]) -> None:
    """An error if blocks were sharded by FSDP2, and what their adapters share was not.

    Raises:
        AdapterError: gradients of a shared tensor would not be reduced.
    """
    sharing = [a for state in states for a in state.attachments.values() if a.shared]
    if not sharing or not _fsdp2_groups(root) or _is_inside(root, _fsdp2_class()):
        return
    for attachment in sharing:
        for name in attachment.shared:
            if attachment.specs[name].trainable:
                raise AdapterError(
                    f"blocks of this model were sharded by fully_shard, and {name!r}, which layers "
                    "share, was not",
                    expected=f"It is a parameter of the model itself. {REASON}",
                    fix="Call fully_shard(model) after fully_shard of its blocks",
                    layer=attachment.layer.path,
                )


def reshard(root: nn.Module) -> None:
    """Let FSDP2 take back what it keeps whole after a forward: what is written there is lost."""
    for group in _fsdp2_groups(root):
        group.reshard()


def _fsdp2_groups(root: nn.Module) -> list[Any]:
    """The modules on which fully_shard was called."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    return [module for module in root.modules() if isinstance(module, _fsdp2_class())]


def _fsdp2_class() -> type[Any]:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


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
    return _is_inside(root, nn.parallel.DistributedDataParallel)


def _is_inside(root: nn.Module, cls: type[Any]) -> bool:
    """Whether a module of a class is this model or holds it."""
    wrappers: list[nn.Module] = [each for each in gc.get_objects() if isinstance(each, cls)]
    return any(root is module for wrapper in wrappers for module in wrapper.modules())
