"""EVA as a plugin of lora-lite."""

from lora_lite_eva.eva import EVA

__all__ = ["EVA"]
