"""Adapters for PyTorch models: a minimal core, one plugin a method.

import lora_lite as ll

adapter = ll.attach(model, "lora", r=8)

This namespace is for those who use adapters; `lora_lite.author` is for those who write methods.
"""

from lora_lite.adapter import Adapter
from lora_lite.attaching import adapters, attach, detach

# Names of the authors' namespace that were documented here before it was there.
from lora_lite.author import LayerKind as LayerKind
from lora_lite.author import LayerKindError as LayerKindError
from lora_lite.author import Observer as Observer
from lora_lite.author import Rng as Rng
from lora_lite.author import Site as Site
from lora_lite.author import SiteError as SiteError
from lora_lite.author import Tensors as Tensors
from lora_lite.author import TensorSpec as TensorSpec
from lora_lite.author import Variant as Variant
from lora_lite.author import VariantContractError as VariantContractError
from lora_lite.author import VariantDefinitionError as VariantDefinitionError
from lora_lite.author import check_rank as check_rank
from lora_lite.author import top_r_svd as top_r_svd
from lora_lite.by_row import adapters_by_row
from lora_lite.checkpoint import load, save
from lora_lite.diagnose import Report, check
from lora_lite.errors import (
    AdapterError,
    AdapterFileError,
    AdapterWarning,
    BaseMismatchError,
    CalibrationError,
    CheckError,
    FieldError,
    LoraLiteError,
    MisfitError,
    PluginError,
    TargetError,
    UnknownVariantError,
)
from lora_lite.hub import push_to_hub
from lora_lite.placements import Plan, plan
from lora_lite.plugins import VariantInfo, variants
from lora_lite.training import param_groups, restore_all, save_all

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterFileError",
    "AdapterWarning",
    "BaseMismatchError",
    "CalibrationError",
    "CheckError",
    "FieldError",
    "LoraLiteError",
    "MisfitError",
    "Plan",
    "PluginError",
    "Report",
    "TargetError",
    "UnknownVariantError",
    "VariantInfo",
    "adapters",
    "adapters_by_row",
    "attach",
    "check",
    "detach",
    "load",
    "param_groups",
    "plan",
    "push_to_hub",
    "restore_all",
    "save",
    "save_all",
    "variants",
]
