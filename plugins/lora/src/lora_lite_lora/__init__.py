"""LoRA as a plugin of lora-lite."""

from lora_lite_lora.lora import LoRA

__all__ = ["LoRA"]
