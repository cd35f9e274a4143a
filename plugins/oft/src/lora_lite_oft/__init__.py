"""OFT as a plugin of lora-lite."""

from lora_lite_oft.oft import OFT

__all__ = ["OFT"]
