"""Supervised fine-tuning with TRL, of the whole model."""

from common import Task
from trl import SFTConfig, SFTTrainer

task = Task.of_command_line()
model = task.model()
trainer = SFTTrainer(
    model,
    args=SFTConfig(**task.settings()),
    train_dataset=task.solutions(),
    processing_class=task.tokenizer(),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
