"""Folders of Hugging Face PEFT as a format of lora-lite."""

from lora_lite_peft.native import has_native_type
from lora_lite_peft.peft import Peft

__all__ = ["Peft", "has_native_type"]
