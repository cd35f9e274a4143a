"""AdaLoRA as a plugin of lora-lite."""

from lora_lite_adalora.adalora import AdaLoRA

__all__ = ["AdaLoRA"]
