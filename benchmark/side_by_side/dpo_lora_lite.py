"""Direct preference optimisation with TRL, of lora-lite's LoRA."""

import lora_lite as ll
from common import Task
from lora_lite_transformers import adapted
from trl import DPOConfig, DPOTrainer

task = Task.of_command_line()
model = task.model()
ll.attach(model, "lora", r=8)
trainer = adapted(DPOTrainer)(
    model,
    args=DPOConfig(**task.settings()),
    train_dataset=task.preferences(),
    processing_class=task.tokenizer(),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
