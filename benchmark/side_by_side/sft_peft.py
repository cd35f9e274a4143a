"""Supervised fine-tuning with TRL, of PEFT's LoRA."""

from common import Task
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

task = Task.of_command_line()
model = task.model()
trainer = SFTTrainer(
    model,
    args=SFTConfig(**task.settings()),
    train_dataset=task.solutions(),
    processing_class=task.tokenizer(),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
