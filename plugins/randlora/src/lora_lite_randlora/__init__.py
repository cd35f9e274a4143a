"""RandLoRA as a plugin of lora-lite."""

from lora_lite_randlora.randlora import RandLoRA

__all__ = ["RandLoRA"]
