"""Direct preference optimisation with TRL, of PEFT's LoRA."""

from common import Task
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

task = Task.of_command_line()
model = task.model()
trainer = DPOTrainer(
    model,
    args=DPOConfig(**task.settings()),
    train_dataset=task.preferences(),
    processing_class=task.tokenizer(),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train(resume_from_checkpoint=task.resume)
trainer.save_model(f"{task.out}/final")
