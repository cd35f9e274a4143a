"""VB-LoRA as a plugin of lora-lite."""

from lora_lite_vb_lora.vb_lora import VBLoRA

__all__ = ["VBLoRA"]
