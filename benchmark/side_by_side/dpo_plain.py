"""Direct preference optimisation with TRL, of the whole model."""

from common import Task
from trl import DPOConfig, DPOTrainer

task = Task.of_command_line()
model = task.model()
trainer = DPOTrainer(
    model,
    args=DPOConfig(**task.settings()),
    train_dataset=task.preferences(),
    processing_class=task.tokenizer(),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
