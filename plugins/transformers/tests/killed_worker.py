"""Run by test_kills.py: trains with checkpoints, and is killed again and again until it is through.

Every attempt is a fork of this process, which has imported everything. SIGKILL comes at a random
moment, in a step or in the middle of writing a checkpoint, and the next attempt resumes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
from lora_lite_transformers import adapted
from lora_lite_transformers.checkpoints import last_complete
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

STEPS = 8
FIELDS: dict[str, Any] = {
    "lora": {"r": 2, "dropout": 0.1},
    "dora": {"r": 2},
    "antipasto": {"r": 8},
    "adalora": {"r": 4, "total": STEPS, "every": 2},
}


def train(folder: Path, method: str) -> None:
    """Train to the end, from the last whole checkpoint if there is one, and save the adapter."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if method == "recipe":
        ll.attach(model, {r"down_proj$": "lora", r"norm$": "full"})
    else:
        ll.attach(model, method, targets=r"down_proj$", **FIELDS[method])
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=STEPS, save_steps=1,
        save_total_limit=3, learning_rate=1e-2, weight_decay=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    tokens = torch.randint(2, 32, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = adapted(Trainer)(model, args=arguments, train_dataset=rows)
    # The first checkpoint may be torn, and then there is none to go on from.
    trainer.train(resume_from_checkpoint=last_complete(folder))
    ll.adapters(model)["default"].save(folder / "trained")


def attempt(folder: Path, method: str, patience: float) -> bool:
    """Whether the training came to its end within so many seconds. If not, it was killed."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, method)
        except BaseException as error:
            print(f"{method}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                sys.exit(f"an attempt ended with status {status}")
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    """killed_worker.py FOLDER KILLS METHOD...: for each method FOLDER/METHOD/whole and /killed."""
    torch.set_num_threads(1)
    folder, kills, methods = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    moments = random.Random(0)
    for method in methods:
        started = time.monotonic()
        assert attempt(folder / method / "whole", method, patience=600)
        takes = time.monotonic() - started
        killed = folder / method / "killed"
        patiences = (moments.uniform(0.1, 1) * takes for _ in range(kills))
        through = any(attempt(killed, method, patience) for patience in patiences)
        assert through or attempt(killed, method, patience=600)


if __name__ == "__main__":
    main()
