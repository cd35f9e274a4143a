"""The 4-bit and 8-bit linear layers of bitsandbytes as a plugin of lora-lite."""

from lora_lite_bitsandbytes.kind import BitsAndBytes
from lora_lite_bitsandbytes.trainer import trainer_accepts

__all__ = ["BitsAndBytes", "trainer_accepts"]
