"""AntiPaSTO as a plugin of lora-lite."""

from lora_lite_antipasto.antipasto import AntiPaSTO

__all__ = ["AntiPaSTO"]
