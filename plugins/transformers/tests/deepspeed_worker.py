"""Run by test_deepspeed.py: trains under DeepSpeed, on CPUs, or in one process without it.

deepspeed_worker.py FOLDER STAGE METHOD [CHECKPOINT]     STAGE 0 is without DeepSpeed
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
from lora_lite_transformers import adapted
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

FIELDS: dict[str, Any] = {
    "lora": {"r": 2},
    "dora": {"r": 2},
    "hra": {"r": 2, "reg": 0.1},
    "antipasto": {"r": 8},
}
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def let_accelerate_use_cpus() -> None:
    """accelerate counts processes on accelerators alone, though DeepSpeed works without."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)


def main() -> None:
    torch.set_num_threads(1)
    folder, stage, method, *checkpoint = sys.argv[1:]
    several: dict[str, Any] = {"use_cpu": True}
    if stage != "0":
        let_accelerate_use_cpus()
        auto = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
            "auto",
        )
        several = {"deepspeed": {"zero_optimization": {"stage": int(stage)}, **auto}}
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    adapter = ll.attach(model, method, targets=r"(q|down)_proj$", seed=3, **FIELDS[method])
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4 // WORLD, max_steps=4, save_steps=2,
        learning_rate=1e-2, weight_decay=0.1, logging_steps=1, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, seed=0, **several,
    )  # fmt: skip
    tokens = torch.randint(2, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = adapted(Trainer)(model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "losses.json").write_text(json.dumps(losses))
        torch.save(adapter.state_dict(), Path(folder, "state"))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still wait for a peer that has gone


if __name__ == "__main__":
    main()
