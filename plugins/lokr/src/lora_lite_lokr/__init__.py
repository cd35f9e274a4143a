"""LoKr as a plugin of lora-lite."""

from lora_lite_lokr.lokr import LoKr

__all__ = ["LoKr"]
