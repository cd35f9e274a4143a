"""The reference of preference training without a second model in memory.

The policy is the base with its adapters. What it computed at the start of training is what it
computes now with its adapters disabled, if they were new; or with frozen copies in their place, if
training starts from adapters that were trained already.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
from lora_lite.notices import still_at_start
from torch import Tensor, nn

SUFFIX = "_reference"


class Reference(nn.Module):
    """A model as it is now, for a trainer's `ref_model`: a module without parameters of its own.

        trainer = DPOTrainer(model, ref_model=Reference(model), ...)

    `adapted(DPOTrainer)` makes one by itself. It computes, bit for bit, what a full copy of the
    model in eval mode would.

    An adapter that was trained before is copied, under its name with `_reference` added: frozen,
    and off except in here. The copy is saved with the adapters, so that a run that is resumed
    compares with the same reference. A second Reference of a model takes the place of the first.

    Args:
        model: the policy, with its adapters. Make the reference before the model is wrapped or
            sharded.

    Raises:
        AdapterError: the model has no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_policy", model)  # not a submodule: its parameters are not ours
        trained, copies = _split(model)
        self._trained, self._copies = trained, copies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy computed at the start."""
        with _evaluating(self._policy), self._in_place_of_the_policy():
            return self._policy(*args, **kwargs)

    @contextmanager
    def _in_place_of_the_policy(self) -> Iterator[None]:
        with ExitStack() as stack:
            for adapter in self._trained:
                stack.enter_context(adapter.disabled())
            for copy in self._copies:
                copy.enabled = True
                stack.callback(setattr, copy, "enabled", False)
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's: what the reference is made of."""
        return self._policy.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The policy's attributes: its config, its embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_policy"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Tools that change a model's forward (autocast, TRL's fused head) change the policy's too,
        # which is the one that runs. Put here, it would go past FSDP's hooks on the policy.
        if name != "forward":
            super().__setattr__(name, value)


def _split(model: nn.Module) -> tuple[list[ll.Adapter], list[ll.Adapter]]:
    """The adapters that are disabled in the reference, and the copies that are enabled instead."""
    attached = ll.adapters(model)
    if not attached:
        raise ll.AdapterError(
            f"this {type(model).__name__} has no adapter, so it cannot be its own reference",
            fix="Attach or load one first",
        )
    for name in [name for name in attached if name.endswith(SUFFIX)]:
        attached.pop(name).detach()
    trained = [
        adapter
        for adapter in attached.values()
        if adapter.enabled and any(p.requires_grad for p in adapter.parameters())
    ]
    return trained, [_copy(model, each) for each in trained if not _is_base(each)]


def _is_base(adapter: ll.Adapter) -> bool:
    """Whether the model with this adapter still computes what the base does, bit for bit."""
    if adapter._state.is_loaded:
        return False
    if any(variant.identity != "exact" for variant in adapter.sites.values()):
        return False
    by_layer: dict[str, list[Tensor]] = {}
    for key, parameter in adapter.named_parameters():
        by_layer.setdefault(key.rpartition(".")[0], []).append(parameter)
    return all(still_at_start(parameters) for parameters in by_layer.values())


def _copy(model: nn.Module, adapter: ll.Adapter) -> ll.Adapter:
    """A frozen copy of an adapter, attached and off."""
    variants = {type(variant) for variant in adapter.sites.values()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter"
        adapter.save(file)
        copy = ll.load(model, file, name=f"{adapter.name}{SUFFIX}", variant=variants)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    copy.enabled = False
    return copy


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, and each of its modules in its own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training
