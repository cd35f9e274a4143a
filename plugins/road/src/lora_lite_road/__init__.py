"""ROAD as a plugin of lora-lite."""

from lora_lite_road.road import ROAD

__all__ = ["ROAD"]
