"""What the author of a variant or of a layer kind needs, in one namespace.

from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
"""

from lora_lite.errors import (
    CalibrationError,
    LayerKindError,
    SiteError,
    VariantContractError,
    VariantDefinitionError,
)
from lora_lite.field_types import DropoutRate, Finite, NonNegativeFinite, PositiveFinite
from lora_lite.layers import LayerKind
from lora_lite.linalg import check_rank, row_signs, top_r_svd
from lora_lite.lora_form import lora_scale, uniform_start
from lora_lite.site import Site
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import Observer, Rng, ScaledVariant, Tensors, Variant

__all__ = [
    "CalibrationError",
    "DropoutRate",
    "Finite",
    "LayerKind",
    "LayerKindError",
    "NonNegativeFinite",
    "Observer",
    "PositiveFinite",
    "Rng",
    "ScaledVariant",
    "Site",
    "SiteError",
    "TensorSpec",
    "Tensors",
    "Variant",
    "VariantContractError",
    "VariantDefinitionError",
    "check_rank",
    "lora_scale",
    "row_signs",
    "top_r_svd",
    "uniform_start",
]
