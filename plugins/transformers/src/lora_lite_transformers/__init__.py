"""Adapters of lora-lite in transformers' Trainer, TRL, accelerate and Lightning.

from lora_lite_transformers import adapted

trainer = adapted(Trainer)(model, ...)
"""

from lora_lite_transformers.accelerator import register
from lora_lite_transformers.reference import Reference
from lora_lite_transformers.trainer import adapted

__all__ = ["Reference", "adapted", "register"]
