"""What full fine-tuning and PEFT's adapters have in common: parameters, and nothing else to do."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["Unbounded"]


class Unbounded:
    """The part of an adapter that a run asks for and that does nothing here."""

    def project_after(self, optimizer: torch.optim.Optimizer) -> None:
        """Does nothing: no parameter is kept within bounds."""

    def penalty(self) -> float:
        return 0.0

    def frozen(self) -> AbstractContextManager[None]:
        """Does nothing: a forward computes as in training."""
        return nullcontext()
