"""accelerate's `save_state` and `load_state`, with adapters in place of models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
from accelerate import Accelerator, DistributedType
from accelerate import accelerator as accelerators
from torch import nn

from lora_lite_transformers.exchanged import exchanged

# The functions of accelerate that save and load a sharded model. They are not documented, and
# nothing else decides what is in a checkpoint of FSDP. A test compares their parameters with these.
SAVE, LOAD = "save_fsdp_model", "load_fsdp_model"
PRIVATE = dict.fromkeys((SAVE, LOAD), ("fsdp_plugin", "accelerator", "model"))


def register(accelerator: Accelerator) -> None:
    """Let `save_state` save adapters instead of models, and `load_state` restore them.

    Call it once, before the first of them. Models without an adapter are saved as before. All else
    (optimizers, schedulers, samplers, random states) is accelerate's. Under FSDP2 as well.

    Args:
        accelerator: with any number of models.

    Raises:
        AdapterError: under FSDP1, where a process never sees a whole adapter, and under DeepSpeed,
            whose engine saves the whole model and asks nobody.
    """
    kind = accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        raise ll.AdapterError(
            "the engine of DeepSpeed saves whole models, and asks no hook before",
            fix="Save with lora_lite.save_all(model, folder), or train under FSDP2",
        )
    if kind is DistributedType.FSDP:
        _register_sharded(accelerator)
        return
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


# --- FSDP2


def _register_sharded(accelerator: Accelerator) -> None:
    """Of a sharded model accelerate saves the whole before it asks any hook.

    So its own functions are exchanged, for as long as this accelerator saves or loads.
    """
    if not getattr(accelerator, "is_fsdp2", False):  # older ones know FSDP1 alone
        raise ll.AdapterError(
            "the accelerator shards by FSDP1, where a process never sees a whole adapter",
            fix="Use fsdp_version=2",
        )
    for name, function, instead in (
        ("save_state", SAVE, ll.save_all),
        ("load_state", LOAD, ll.restore_all),
    ):
        method = getattr(accelerator, name)
        setattr(accelerator, name, _with_adapters(method, function, instead))


def _with_adapters(
    method: Callable[..., Any], function: str, instead: Callable[[nn.Module, Path], None]
) -> Callable[..., Any]:
    """`method`, in which accelerate's `function` does `instead` where a model has adapters."""
    original = getattr(accelerators, function)

    def for_adapters(
        plugin: Any, accelerator: Any, model: nn.Module, folder: str, number: int = 0, **rest: Any
    ) -> Any:
        if not ll.adapters(model):
            return original(plugin, accelerator, model, folder, number, **rest)
        instead(model, _folder(folder, number))
        return accelerator.wait_for_everyone()

    @functools.wraps(method)
    def changed(*args: Any, **kwargs: Any) -> Any:
        with exchanged(accelerators, function, for_adapters):
            return method(*args, **kwargs)

    return changed
