"""Adapters for PyTorch models: a minimal core, one plugin a method.

import lora_lite as ll

adapter = ll.attach(model, "lora", r=8)
"""

# ruff: noqa: I001
from lora_lite.adapter import Adapter, adapters, attach, detach
from lora_lite.checkpoint import load, save
from lora_lite.diagnose import Report, check
from lora_lite.errors import (
    AdapterError,
    AdapterFileError,
    BaseMismatchError,
    CalibrationError,
    CheckError,
    FieldError,
)
from lora_lite.errors import (
    LayerKindError,
    LoraLiteError,
    MisfitError,
    PluginError,
    SiteError,
    TargetError,
)
from lora_lite.errors import UnknownVariantError, VariantContractError, VariantDefinitionError
from lora_lite.layers import LayerKind
from lora_lite.linalg import check_rank, top_r_svd
from lora_lite.plugins import VariantInfo, variants
from lora_lite.targets import Plan, plan
from lora_lite.variant import Observer, Rng, ScaledVariant, Site, Tensors, TensorSpec, Variant

__all__ = [
    "Adapter", "AdapterError", "AdapterFileError", "BaseMismatchError", "CalibrationError", "CheckError", "FieldError",
    "LayerKind", "LayerKindError", "LoraLiteError", "MisfitError", "Observer", "Plan", "PluginError", "Report", "Rng", "Site",
    "SiteError", "TargetError", "TensorSpec", "Tensors", "UnknownVariantError", "Variant", "VariantContractError",
    "VariantDefinitionError", "VariantInfo",
    "adapters", "attach", "check", "check_rank", "detach", "load", "plan", "save", "top_r_svd", "variants",
]  # fmt: skip
