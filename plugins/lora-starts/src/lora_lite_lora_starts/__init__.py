"""CorDA, MiLoRA and OLoRA as plugins of lora-lite."""

from lora_lite_lora_starts.starts import CorDA, MiLoRA, OLoRA

__all__ = ["CorDA", "MiLoRA", "OLoRA"]
