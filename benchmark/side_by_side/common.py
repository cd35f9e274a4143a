"""What the scripts have in common, so that they differ in what they are compared for alone."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 6
TOKENS = 128


@dataclass(frozen=True)
class Task:
    """What a script is told: MODEL DATA OUT [resume].

    Attributes:
        folder: of the model.
        rows: questions and answers, of GSM8K or in its format.
        out: the Trainer's folder.
        resume: whether to go on from the last checkpoint in it.
    """

    folder: str
    rows: list[dict[str, str]]
    out: str
    resume: bool

    @classmethod
    def of_command_line(cls) -> "Task":
        folder, data, out, *more = sys.argv[1:]
        lines = Path(data).read_text(encoding="utf-8").splitlines()[: 4 * STEPS]
        return cls(folder, [json.loads(line) for line in lines], out, more == ["resume"])

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    def solutions(self) -> Dataset:
        """For supervised fine-tuning."""
        return Dataset.from_list(
            [{"prompt": row["question"], "completion": row["answer"]} for row in self.rows]
        )

    def preferences(self) -> Dataset:
        """The right answer is chosen, and that of the next question rejected."""
        others = [*self.rows[1:], self.rows[0]]
        return Dataset.from_list(
            [
                {"prompt": row["question"], "chosen": row["answer"], "rejected": other["answer"]}
                for row, other in zip(self.rows, others, strict=True)
            ]
        )

    def settings(self) -> dict[str, Any]:
        """A few small steps on a CPU, with a checkpoint at half and at the end."""
        return {
            "output_dir": self.out,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "per_device_train_batch_size": 2,
            "max_length": TOKENS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "seed": 0,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }
