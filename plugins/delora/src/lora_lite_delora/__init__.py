"""DeLoRA as a plugin of lora-lite."""

from lora_lite_delora.delora import DeLoRA

__all__ = ["DeLoRA"]
