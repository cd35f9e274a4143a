"""FourierFT as a plugin of lora-lite."""

from lora_lite_fourierft.fourierft import FourierFT

__all__ = ["FourierFT"]
