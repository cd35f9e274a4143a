"""A quantised base in the Trainer.

The Trainer refuses a quantised model unless adapters are there to be trained, and knows only those
of PEFT. It asks once, while it is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# transformers' flag on a model: it holds adapters that transformers itself manages.
FLAG = "_hf_peft_config_loaded"


@contextmanager
def accepted_by_trainer(model: object) -> Iterator[None]:
    """A context in which the Trainer takes a quantised model.

    Left on the model, the flag would break `save_pretrained`.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = vars(model).get(FLAG)
    setattr(model, FLAG, True)
    try:
        yield
    finally:
        if before is None:
            delattr(model, FLAG)
        else:
            setattr(model, FLAG, before)
