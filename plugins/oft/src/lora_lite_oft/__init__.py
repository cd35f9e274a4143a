"""OFT and BOFT as a plugin of lora-lite."""

from lora_lite_oft.boft import BOFT
from lora_lite_oft.oft import OFT

__all__ = ["BOFT", "OFT"]
