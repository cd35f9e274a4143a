"""DoRA as a plugin of lora-lite."""

from lora_lite_dora.dora import DoRA

__all__ = ["DoRA"]
