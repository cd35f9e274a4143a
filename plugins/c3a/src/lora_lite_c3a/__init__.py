"""C3A as a plugin of lora-lite."""

from lora_lite_c3a.c3a import C3A

__all__ = ["C3A"]
