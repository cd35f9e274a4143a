"""What the steps of a run work with: the base, the training rows, and where files go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_lite_benchmark.config import SPECIAL_ROWS, RunConfig
from lora_lite_benchmark.data import (
    Batch,
    Example,
    Problem,
    collate,
    load_problems,
    training_examples,
)
from lora_lite_benchmark.models import load_model, load_tokenizer
from lora_lite_benchmark.processes import is_sharded
from lora_lite_benchmark.train import batch_rows

__all__ = ["Setup", "fresh_base", "prepare"]

ADAPTER_FILE = "adapter.safetensors"
PEFT_FILE = Path("peft", "adapter_model.safetensors")
"""Where PEFT writes its tensors, below the folder that it is given."""


@dataclass(frozen=True)
class Setup:
    """What every step works with.

    Attributes:
        folder: of this run's files.
        model: the base, on which the adapter comes.
        examples: the training rows as tokens.
        skipped: how many training rows were too long.
        problems: what is looked at after training, as far as the config has it, by "validation" and
            "test": a run whose problems cannot be read ends before it is trained.
        batch: the rows of the first training step, on which costs are measured.
    """

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    tokenizer: Any
    model: nn.Module
    examples: list[Example]
    skipped: int
    problems: Mapping[str, Sequence[Problem]]
    batch: Batch

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def pad(self) -> int:
        token: int = self.tokenizer.pad_token_id
        return token

    @property
    def trains(self) -> bool:
        return self.config.variant != "base"

    @property
    def has_adapter(self) -> bool:
        return self.config.variant not in SPECIAL_ROWS

    @property
    def is_ours(self) -> bool:
        """Whether it trains an adapter of lora-lite."""
        return self.has_adapter and self.config.implementation == "lora-lite"

    @property
    def adapter_file(self) -> Path:
        if self.config.implementation == "peft":
            return self.folder / PEFT_FILE
        return self.folder / ADAPTER_FILE


def prepare(config: RunConfig, folder: Path, accelerator: Accelerator) -> Setup:
    tokenizer = load_tokenizer(config)
    sources = {"validation": config.validation, "test": config.test}
    examples, skipped = training_examples(tokenizer, config)
    first_rows = batch_rows(0, len(examples), config)
    batch = collate([examples[row] for row in first_rows], tokenizer.pad_token_id)
    return Setup(
        config=config,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=fresh_base(config, accelerator),
        examples=examples,
        skipped=skipped,
        problems={name: load_problems(source) for name, source in sources.items() if source},
        batch=batch.to(accelerator.device),
    )


def fresh_base(config: RunConfig, accelerator: Accelerator) -> nn.Module:
    """A base on this process's device; or, if it will be sharded, in the machine's memory."""
    return load_model(config, "cpu" if is_sharded(accelerator) else accelerator.device)
