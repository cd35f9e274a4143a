"""CorDA, LoRA-GA, MiLoRA and OLoRA as plugins of lora-lite."""

from lora_lite_lora_starts.lora_ga import LoRAGA
from lora_lite_lora_starts.starts import CorDA, MiLoRA, OLoRA

__all__ = ["CorDA", "LoRAGA", "MiLoRA", "OLoRA"]
