"""accelerate's `save_state` and `load_state`, with adapters in place of models."""

from pathlib import Path
from typing import Any

import lora_lite as ll
from accelerate import Accelerator, DistributedType
from torch import nn


def register(accelerator: Accelerator) -> None:
    """Let `save_state` save adapters instead of models, and `load_state` restore them.

    Call it once, before the first of them. Models without an adapter are saved as before. All else
    (optimizers, schedulers, samplers, random states) is accelerate's.

    Args:
        accelerator: with any number of models.

    Raises:
        AdapterError: under FSDP and DeepSpeed, where accelerate saves the whole model before it
            asks anybody.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ll.AdapterError(
            f"accelerate saves whole models under {accelerator.distributed_type.value}, and asks "
            "no hook before",
            fix="Save with lora_lite.save_all(model, folder) and accelerate.utils."
            "save_fsdp_optimizer; or train with lora_lite_transformers.adapted(Trainer)",
        )
    hooks = _Hooks(accelerator)
    accelerator.register_save_state_pre_hook(hooks.save)
    accelerator.register_load_state_pre_hook(hooks.load)


class _Hooks:
    """The two hooks, on one accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def save(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        """Take the weights of models with adapters out of what is going to be saved."""
        for number, model in reversed(list(enumerate(models))):
            if ll.adapters(model):
                if self.accelerator.is_main_process:
                    ll.save_all(model, _folder(folder, number))
                del weights[number]

    def load(self, models: list[nn.Module], folder: str) -> None:
        """Restore the adapters, and take their models out of what is going to be loaded."""
        for number, model in reversed(list(enumerate(models))):
            if ll.adapters(model):
                ll.restore_all(model, _folder(folder, number))
                del models[number]


def _folder(folder: str, number: int) -> Path:
    """Of the adapters of one of the accelerator's models."""
    return Path(folder) / ("adapters" if number == 0 else f"adapters_{number}")
