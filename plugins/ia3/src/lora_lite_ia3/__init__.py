"""IA3 and IA3-FF as a plugin of lora-lite."""

from lora_lite_ia3.ia3 import IA3, IA3FF

__all__ = ["IA3", "IA3FF"]
