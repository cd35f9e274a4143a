"""A callback for Lightning: checkpoints of adapters, and `project` after every step.

The penalty of a method is the training step's own: `loss + adapter.penalty()`.
"""

from typing import Any

import lora_lite as ll
from lightning.pytorch import Callback, LightningModule, Trainer
from lora_lite.attachment import attribute


class AdapterCheckpoint(Callback):  # type: ignore[misc]  # it is not typed
    """Let Lightning's checkpoints hold what training has changed, without the frozen base.

        trainer = lightning.Trainer(callbacks=[AdapterCheckpoint()], ...)

    A checkpoint is loaded into a module with the same adapters attached: another variant, other
    fields or layers are an error.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The base is not in the checkpoint, and Lightning must not miss it."""
        pl_module.strict_loading = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the parameters back into the allowed set after every step."""
        for optimizer in trainer.optimizers:
            for adapter in ll.adapters(pl_module).values():
                adapter.project_after(optimizer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the frozen parameters of the base out."""
        frozen = _frozen_base(pl_module)
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if k not in frozen}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint without the adapters, which Lightning no longer misses.

        Raises:
            AdapterFileError: it names the tensors that are missing.
        """
        expected = pl_module.state_dict().keys() - _frozen_base(pl_module)
        missing = sorted(expected - checkpoint["state_dict"].keys())
        if missing:
            raise ll.AdapterFileError(
                f"the checkpoint lacks {len(missing)} tensors that this module trains",
                details=missing,
                fix="Attach the adapters that it was saved with",
                tensors=tuple(missing),
            )


def _frozen_base(module: LightningModule) -> set[str]:
    """The names of the base's parameters that do not train."""
    own = tuple(attribute(adapter, "") for adapter in ll.adapters(module))
    return {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and not name.rpartition(".")[2].startswith(own)
    }
