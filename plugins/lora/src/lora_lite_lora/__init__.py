"""LoRA as a plugin of lora-lite."""

from lora_lite_lora.lora import LoRA
from lora_lite_lora.lora_bias import LoRABias

__all__ = ["LoRA", "LoRABias"]
