"""HiRA as a plugin of lora-lite."""

from lora_lite_hira.hira import HiRA

__all__ = ["HiRA"]
