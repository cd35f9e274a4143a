"""MiSS as a plugin of lora-lite."""

from lora_lite_miss.miss import MiSS

__all__ = ["MiSS"]
