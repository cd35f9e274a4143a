"""Layers trained in full, as plugins of lora-lite."""

from lora_lite_full.full import Full
from lora_lite_full.tokens import Tokens

__all__ = ["Full", "Tokens"]
