"""LoHa as a plugin of lora-lite."""

from lora_lite_loha.loha import LoHa

__all__ = ["LoHa"]
