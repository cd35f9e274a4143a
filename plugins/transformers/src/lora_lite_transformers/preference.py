"""Trainers that compare the policy with a reference model get a `Reference`.

There are two kinds. DPO and KTO take `ref_model=`, and load a second model if it is not given. GRPO
and RLOO take none, and load one if `beta`, the weight of the comparison, is not 0.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lora_lite as ll
from torch import nn

from lora_lite_transformers.reference import Reference


@contextmanager
def reference_for(trainer: Any, arguments: inspect.BoundArguments) -> Iterator[None]:
    """A context in which a trainer is made that compares with the model as it is now, if at all.

    Args:
        trainer: not initialised yet.
        arguments: of its `__init__`; a reference is added if it takes one.

    Raises:
        AdapterError: the reference is to follow the policy, which it cannot.
    """
    given = arguments.arguments
    model: Any = given.get("model")
    args: Any = given.get("args")
    if not isinstance(model, nn.Module) or not ll.adapters(model):
        yield
    elif "ref_model" in arguments.signature.parameters:
        if given.get("ref_model") is None:
            _refuse_following(args)
            given["ref_model"] = Reference(model)
        yield
    elif getattr(args, "beta", 0.0):
        _refuse_following(args)
        reference, beta = Reference(model), args.beta
        args.beta = 0.0  # or it would load a second model
        try:
            yield
        finally:
            args.beta = beta
        if hasattr(trainer, "ref_model"):
            trainer.beta, trainer.ref_model = beta, reference
    else:
        yield


def _refuse_following(args: Any) -> None:
    if getattr(args, "sync_ref_model", False):
        raise ll.AdapterError(
            "sync_ref_model=True asks for a reference that follows the policy, and the reference "
            "is the policy itself, as it was at the start",
            fix="Leave sync_ref_model out, or give a second model as ref_model=",
        )
