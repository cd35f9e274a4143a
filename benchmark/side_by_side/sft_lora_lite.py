"""Supervised fine-tuning with TRL, of lora-lite's LoRA."""

import lora_lite as ll
from common import Task
from lora_lite_transformers import adapted
from trl import SFTConfig, SFTTrainer

task = Task.of_command_line()
model = task.model()
ll.attach(model, "lora", r=8)
trainer = adapted(SFTTrainer)(
    model,
    args=SFTConfig(**task.settings()),
    train_dataset=task.solutions(),
    processing_class=task.tokenizer(),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
