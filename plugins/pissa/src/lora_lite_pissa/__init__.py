"""PiSSA as a plugin of lora-lite."""

from lora_lite_pissa.pissa import PiSSA

__all__ = ["PiSSA"]
