"""transformers' Trainer on a quantised model."""

from collections.abc import Iterator
from contextlib import contextmanager

from lora_lite import AdapterError, adapters
from torch import nn

# transformers' flag on a model: it holds adapters that transformers itself manages.
FLAG = "_hf_peft_config_loaded"


@contextmanager
def trainer_accepts(model: nn.Module) -> Iterator[None]:
    """A context in which transformers' `Trainer` can be built on a quantised model with adapters.

    So can the trainers that are made from it. The Trainer refuses a quantised model unless adapters
    are there to be trained, and knows only adapters of PEFT. It asks once, while it is built. The
    flag that answers it would break `save_pretrained`, so it is set for this long and no longer.

    Raises:
        AdapterError: the model has no adapter, so the Trainer is right.
    """
    if not adapters(model):
        raise AdapterError(
            f"this {type(model).__name__} has no adapter to train", fix="Attach or load one first"
        )
    before = vars(model).get(FLAG)
    setattr(model, FLAG, True)
    try:
        yield
    finally:
        delattr(model, FLAG)
        if before is not None:
            setattr(model, FLAG, before)
