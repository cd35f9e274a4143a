"""The running statistics of the base, which batch normalisation changes in every training forward.

They belong to the base: detach gives them back as they were, and an adapter's file does not hold
them. Saving says so if they have changed, because the base that the file is loaded on has others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lite.modules import named_modules


def running_statistics(root: nn.Module) -> dict[str, Tensor]:
    """A copy of the buffers of every normalisation that keeps statistics, by name."""
    return {name: buffer.detach().clone() for name, buffer in statistics_of(root).items()}


def restore_statistics(root: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Put the statistics back, bit for bit."""
    now = statistics_of(root)
    for name, before in statistics.items():
        if name in now and not _same(now[name], before):
            now[name].detach().copy_(before)


def changed_statistics(root: nn.Module, statistics: Mapping[str, Tensor]) -> list[str]:
    """The names of those that are not what they were."""
    now = statistics_of(root)
    return [n for n, before in statistics.items() if n in now and not _same(now[n], before)]


def statistics_of(root: nn.Module) -> dict[str, Tensor]:
    """The buffers themselves, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in named_modules(root)
        if isinstance(module, _NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def _same(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before.to(now.device))
