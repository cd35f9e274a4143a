"""The Trainer under DeepSpeed, with ZeRO-1 and ZeRO-2: checkpoints without the frozen base.

DeepSpeed's engine takes the optimizer over. It steps on its own copy of what trains, in shards over
the processes, and then writes the parameters. So what is written into a parameter is lost at the
next step: `project` cannot be done, and a restored run needs the engine's state beside the adapter.
With ZeRO-3 a layer has its parameters only while DeepSpeed's own hooks hold them.
"""

from contextlib import AbstractContextManager
from typing import Any

import lora_lite as ll
from torch import nn
from transformers import trainer as trainers

from lora_lite_transformers.checkpoints import refuse_incomplete
from lora_lite_transformers.exchanged import exchanged

# The Trainer's function that loads a checkpoint into DeepSpeed's engine. It is not documented, and
# would miss the frozen base. A test compares its parameters with those here.
LOAD = "deepspeed_load_checkpoint"
PARAMETERS = ("deepspeed_engine", "checkpoint_path", "load_module_strict")


def refuse_unfit(config: dict[str, Any], bounded: list[ll.Adapter]) -> None:
    """An error for what DeepSpeed would do otherwise than the method asks.

    Args:
        config: DeepSpeed's.
        bounded: the adapters that change their parameters after a step.

    Raises:
        AdapterError: it names the part of the config, or the adapter, and what to do.
    """
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ll.AdapterError(
            "ZeRO-3 of DeepSpeed takes the parameters of a layer away from its adapter",
            fix="Use ZeRO-2, or FSDP2, which shards the base as well",
        )
    for part in ("optimizer", "scheduler"):
        if part in config:
            raise ll.AdapterError(
                f"DeepSpeed's config has its own {part!r}",
                expected="It would not know which tensors may decay, and a checkpoint would lack "
                "its state",
                fix=f"Leave {part!r} out of it; the Trainer makes one from its arguments",
            )
    if bounded:
        raise ll.AdapterError(
            f"adapter {bounded[0].name!r} changes its parameters after every step, and DeepSpeed "
            "would undo it: it keeps a copy of them",
            fix="Train it with DDP or FSDP2",
            adapter=bounded[0].name,
        )


def save(engine: Any, folder: str) -> None:
    """Write the engine's state: of the optimizer, and of what trains. All processes call this."""
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)


def load(engine: Any, model: nn.Module, folder: str) -> None:
    """Restore what `save_all` and `save` have written. All processes call this.

    Raises:
        AdapterError: the checkpoint is not complete.
        AdapterFileError: it is of other adapters than the model has.
    """
    refuse_incomplete(folder)
    ll.restore_all(model, folder)
    engine.load_checkpoint(folder, load_module_strict=False)


def loads_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Let the Trainer load checkpoints into DeepSpeed's engine by `load`."""

    def load_adapters(deepspeed_engine: Any, checkpoint_path: str, **_strict: bool) -> None:
        load(deepspeed_engine, model, checkpoint_path)

    return exchanged(trainers, LOAD, load_adapters)
