"""HRA as a plugin of lora-lite."""

from lora_lite_hra.hra import HRA

__all__ = ["HRA"]
