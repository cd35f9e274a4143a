"""SHiRA as a plugin of lora-lite."""

from lora_lite_shira.shira import SHiRA

__all__ = ["SHiRA"]
