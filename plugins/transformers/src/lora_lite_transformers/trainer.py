"""Trainers that train adapters: transformers' own and those that are made from it.

A plain Trainer trains whatever requires a gradient, and knows nothing else of an adapter. Here is
what it then misses, in the order in which a run comes to it:

    get_decay_parameter_names     weight decay where the method wants it
    create_optimizer              `project` after every step
    compute_loss                  `penalty` in the loss, once an update
    save_model                    checkpoints of adapters, without the base
    train, _load_from_checkpoint  a run that is resumed exactly, or not at all
    _load_best_model              the best checkpoint's adapters at the end
"""

import inspect
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
from lora_lite.training import CONTENTS, contents_of
from lora_lite.variant import overrides
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from lora_lite_transformers import deepspeed
from lora_lite_transformers.checkpoints import last_complete, refuse_incomplete
from lora_lite_transformers.preference import reference_for
from lora_lite_transformers.quantised import accepted_by_trainer

# The methods of transformers' Trainer that are not documented and are overridden here all the same:
# nothing else decides what a checkpoint holds. A test compares their parameters with those here.
PRIVATE = {
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_optimizer_and_scheduler": ("output_dir",),
}


@cache
def adapted(trainer: type[Trainer]) -> type[Trainer]:
    """A trainer's class for models with adapters: the one changed line of a training script.

        trainer = adapted(SFTTrainer)(model, args=..., train_dataset=...)

    Its checkpoints hold the adapters and the optimizer's state instead of the model, and resuming
    from one goes on to the same bits. Attach or load the adapters first.

    A trainer that compares with a reference model (DPO, KTO, GRPO) compares with the model as it is
    at the start, without a second model in memory: see `Reference`. Give `ref_model=` for another.

    Args:
        trainer: `Trainer`, `Seq2SeqTrainer`, a trainer of TRL or of sentence-transformers, or a
            subclass of yours.

    Raises:
        AdapterError: when the trainer is made, the model has no adapter; when a checkpoint is
            loaded, it is not complete.
        AdapterFileError: when a checkpoint is loaded, it is of other adapters than the model has.
    """
    return type(f"Adapted{trainer.__name__}", (_Adapted, trainer), {"__doc__": adapted.__doc__})


class _FinishedError(Exception):
    """A run is resumed that has taken all of its steps."""


class _NoStepTooMany(TrainerCallback):  # type: ignore[misc]
    """The Trainer looks at the number of steps after a step: a finished run would take one more."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise _FinishedError


class _Adapted(Trainer):  # type: ignore[misc]  # transformers is not typed
    """What `adapted` puts before a trainer's own class."""

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        self._projects: torch.optim.Optimizer | None = None
        self._penalised: list[ll.Adapter] | None = None
        arguments = inspect.signature(super().__init__).bind_partial(model, *args, **kwargs)
        with accepted_by_trainer(model), reference_for(self, arguments):
            super().__init__(*arguments.args, **arguments.kwargs)
        self.add_callback(_NoStepTooMany())
        if not ll.adapters(self.model):
            raise ll.AdapterError(
                f"this {type(self.model).__name__} has no adapter to train",
                fix="Attach or load one before the trainer is made",
            )
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed.refuse_unfit(config, _adapters_with(self.model, "project", "advance"))

    # --- the optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        groups = ll.param_groups(model, weight_decay=1.0)
        decays = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
        others = set(super().get_decay_parameter_names(model))
        return [
            name
            for name, parameter in model.named_parameters()
            if decays.get(id(parameter), name in others)
        ]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if optimizer is not self._projects:
            self._projects = optimizer
            for adapter in _adapters_with(self.model, "project", "advance"):
                adapter.project_after(optimizer)
        return optimizer

    # --- the loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        computed = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if self._penalised is None:
            self._penalised = _adapters_with(self.model, "penalty")
        if not self._penalised or not model.training:
            return computed
        penalty = self._penalty(self._penalised, kwargs.get("num_items_in_batch"))
        return (computed[0] + penalty, computed[1]) if return_outputs else computed + penalty

    def _penalty(self, adapters: list[ll.Adapter], num_items_in_batch: Any) -> Tensor:
        """One micro-batch's share of the penalty, before the Trainer divides the loss, if it does.

        The shares of one update add up to the penalty, whatever the accumulation.
        """
        penalty = torch.stack([each.penalty().to(self.args.device) for each in adapters]).sum()
        if self._is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        return penalty

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is over all micro-batches of an update already (see training_step)."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    # --- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters, and what else of the model trains, with `lora_lite.save_all`."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save or self.is_fsdp_enabled:
            ll.save_all(self.model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Under these two the Trainer would also save the whole model here.
        if self.is_deepspeed_enabled:
            deepspeed.save(self.model_wrapped, output_dir)
        elif self.is_fsdp_enabled:
            from accelerate.utils import save_fsdp_optimizer

            accelerator = self.accelerator
            plugin = accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._penalised = None  # a hyperparameter search makes other models
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir) or True
        try:
            with self._loading():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except _FinishedError:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, 0.0, {})

    def _loading(self) -> AbstractContextManager[None]:
        """How a checkpoint is loaded while it trains."""
        if self.is_deepspeed_enabled:
            return deepspeed.loads_adapters(self.model)
        return nullcontext()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        refuse_incomplete(resume_from_checkpoint)
        ll.restore_all(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            deepspeed.load(self.model_wrapped, self.model, self.state.best_model_checkpoint)
        else:
            ll.restore_all(self.model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer copies the files that it knows from the checkpoint to the folder it uploads.
        if self.is_world_process_zero():
            for name in (*contents_of(checkpoint_folder).digests, CONTENTS):
                shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _adapters_with(model: nn.Module, *methods: str) -> list[ll.Adapter]:
    """The adapters that have one of these methods, which most variants leave out."""
    return [
        adapter
        for adapter in ll.adapters(model).values()
        if any(overrides(type(v), method) for v in adapter.sites.values() for method in methods)
    ]
