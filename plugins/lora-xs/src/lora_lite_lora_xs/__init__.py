"""LoRA-XS as a plugin of lora-lite."""

from lora_lite_lora_xs.lora_xs import LoRAXS

__all__ = ["LoRAXS"]
