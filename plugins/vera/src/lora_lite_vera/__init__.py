"""VeRA as a plugin of lora-lite."""

from lora_lite_vera.vera import VeRA

__all__ = ["VeRA"]
